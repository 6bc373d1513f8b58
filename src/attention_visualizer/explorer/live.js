// The explorer in a notebook with a kernel behind it: what the page does not hold is asked for, and shown as a new page.

const made = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);

function render({ model, el }) {
  const bar = made("div"), status = made("output"), frame = made("iframe", { title: "Attention explorer" });
  const number = made("input", { type: "number", min: 0, max: model.get("num_images") - 1, value: model.get("image") });
  const shown = () => frame.contentWindow?.explorer; // undefined until the page is drawn
  const wanted = { view: null }; // the address that the next page is to show
  Object.assign(bar.style, { display: "flex", flexWrap: "wrap", gap: "8px", alignItems: "center", padding: "4px 0" });
  Object.assign(frame.style, { width: "100%", height: "900px", border: "1px solid #ccc" });

  const ask = (request) => {
    const { page, pure } = shown() ?? {};
    if (!page) return;
    const { layer, head } = page.state;
    wanted.view = pure.addressOf(page.state, page.header);
    status.textContent = "computing …";
    model.set("request", { ...request, layer, head, number: (model.get("request").number ?? 0) + 1 });
    model.save_changes();
  };
  const button = (text, request) => {
    const node = made("button", { type: "button", textContent: text });
    node.onclick = () => ask(request);
    return node;
  };
  number.onchange = () => ask({ action: "image", image: number.value === "" ? null : Number(number.value) });
  const label = made("label", { textContent: `image (0 to ${model.get("num_images") - 1}) ` });
  label.append(number);
  const whole = button("Show every patch of this layer", { action: "whole" });
  bar.append(label, button("Switch this head off", { action: "off" }), button("Switch all heads on", { action: "on" }), whole, status);

  const load = () => {
    whole.hidden = !model.get("has_cells");
    frame.srcdoc = model.get("page");
  };
  const restore = () => {
    const { page, pure } = shown() ?? {};
    if (!page) return setTimeout(restore, 50); // it is still unpacked
    if (!wanted.view) {
      status.textContent = model.get("status");
      return;
    }
    const edited = page.header.groups.findIndex((group) => group.key === "edited");
    const state = pure.stateOf(wanted.view.replace("images=edited", "images=samples"), page.header, page.usual);
    // Beside the same map of the model as it is.
    const { picture, moment, layer, head } = state;
    if (edited >= 0) Object.assign(state, { group: edited, kept: { group: 0, picture, moment, layer, head } });
    else state.kept = null;
    page.show({ ...state, unknown: [] });
  };
  frame.onload = restore;
  model.on("change:page", load);
  model.on("change:answered", () => (status.textContent = model.get("status"))); // also where nothing else has changed
  el.append(bar, frame);
  load();
}

export default { render };
