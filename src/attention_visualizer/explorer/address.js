// A view of the page as its address, and back; which pictures pass a filter.

/** Return the name of a token in an address: "token1" for those that are no patches, "row,column" for patches; from 1. */
function addressOfToken(token, layout) {
  if (token < layout.prefix) return `token${token + 1}`;
  const patch = token - layout.prefix;
  return `${Math.floor(patch / layout.grid[1]) + 1},${(patch % layout.grid[1]) + 1}`;
}

/** Return a number from 1 to `count`, in digits, as one from 0; null for anything else. */
function numberOf(text, count) {
  return /^\d+$/.test(text ?? "") && text >= 1 && text <= count ? text - 1 : null;
}

/** Return the token of such a name; null for names of none. */
function tokenOfAddress(text, layout) {
  const other = /^token(\d+)$/.exec(text), patch = /^(\d+),(\d+)$/.exec(text);
  if (other) return numberOf(other[1], layout.prefix);
  if (!patch) return null;
  const row = numberOf(patch[1], layout.grid[0]), column = numberOf(patch[2], layout.grid[1]);
  return row === null || column === null ? null : layout.prefix + row * layout.grid[1] + column;
}

/** Return the name of a moment in an address: its step, where it has one. */
function addressOfMoment(moments, moment) {
  return moments[moment].step === null ? `${moment + 1}` : `step${moments[moment].step}`;
}

/** Return the moment of such a name; null for names of none. */
function momentOfAddress(text, moments) {
  const step = /^step(\d+)$/.exec(text ?? "");
  const found = step ? moments.findIndex((moment) => moment.step === Number(step[1])) : -1;
  return found >= 0 ? found : numberOf(text, moments.length);
}

/** Return all filters: "all", and by class, answer and confusion at any moment, as far as they are known. */
function filtersOf(header) {
  const found = new Set();
  for (const { pictures, moments } of header.groups)
    for (const { predicted } of moments)
      pictures.forEach(({ label }, index) => {
        if (label === null) return;
        found.add(`class ${label}`);
        if (predicted[index] === null) return;
        found.add("right").add("wrong");
        if (predicted[index] !== label) found.add(`confused ${label}, ${predicted[index]}`);
      });
  return ["all", ...["right", "wrong"].filter((name) => found.delete(name)), ...[...found].sort()];
}

/** Return the layer of such a number, as reports count them; null for anything else. */
function layerOfAddress(text, { layers }) {
  const found = layers.findIndex(({ number }) => String(number) === text);
  return found < 0 ? null : found;
}

/** Return a view, of a group, picture, moment, layer and column, as it stands in an address. */
function partsOf(view, header) {
  const { key, moments } = header.groups[view.group];
  return [key, view.picture + 1, addressOfMoment(moments, view.moment), header.layers[view.layer].number, columnsOf(header)[view.head]];
}

/** Return the view of such parts, each null where it is of none. */
function viewOf([key, picture, moment, layer, head], header) {
  const group = header.groups.findIndex((each) => each.key === key), of = header.groups[group];
  const column = columnsOf(header).indexOf(head);
  return { group: group < 0 ? null : group, picture: numberOf(picture, of?.pictures.length ?? 0),
    moment: momentOfAddress(moment, of?.moments ?? []), layer: layerOfAddress(layer, header), head: column < 0 ? null : column };
}

/** Return a state's part of the address. */
function addressOf(state, header) {
  const [images, image, moment, layer, head] = partsOf(state, header);
  const fields = { images, image, moment, layer, head, query: addressOfToken(state.query, referenceOf(header)),
    direction: state.direction, colors: state.colors, opacity: state.opacity, smooth: state.smooth ? 1 : 0 };
  if (queriesInList(header)) fields.item = state.item + 1;
  if (state.pinned) fields.pinned = 1;
  if (state.filter !== "all") fields.filter = state.filter;
  if (state.kept) fields.kept = partsOf(state.kept, header).join(".");
  return "#" + Object.entries(fields).map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
}

/** Return `state`, the usual one, with what an address says of it. What is not here stays as it is, and is named in
 * `unknown`. */
function stateOf(address, header, state) {
  const fields = new Map(address.replace(/^#/, "").split("&").filter(Boolean).map((field) => field.split("=").map(decoded)));
  const result = { ...state }, unknown = [];
  const take = (name, value) => {
    if (!fields.has(name)) return;
    if (value === null) unknown.push(`${name}=${fields.get(name)}`);
    else result[{ images: "group", image: "picture" }[name] ?? name] = value;
  };
  const one = (name, choices) => (choices.includes(fields.get(name)) ? fields.get(name) : null);
  const key = header.groups.some((group) => group.key === fields.get("images")) ? fields.get("images") : header.groups[state.group].key;
  const view = viewOf([key, ...["image", "moment", "layer", "head"].map((name) => fields.get(name))], header);
  take("images", one("images", header.groups.map((group) => group.key)) && view.group);
  if (unknown.length) for (const name of ["image", "moment"]) fields.delete(name); // which are of those images
  const group = header.groups[result.group];
  if (result.group !== state.group) Object.assign(result, { picture: 0, moment: group.moments.length - 1 });
  for (const name of ["image", "moment", "layer", "head"]) take(name, view[name === "image" ? "picture" : name]);
  if (!hasColumn(header, result.layer, result.head)) {
    unknown.push(`head=${fields.get("head") ?? result.head + 1}`);
    result.head = headsOf(header);
  }
  take("query", tokenOfAddress(fields.get("query") ?? "", referenceOf(header)));
  take("item", numberOf(fields.get("item"), queriesInList(header)));
  take("direction", one("direction", ["row", "column"]));
  take("colors", one("colors", ["relative", "share"]));
  take("filter", one("filter", filtersOf(header)));
  const opacity = fields.get("opacity");
  take("opacity", /^\d+$/.test(opacity ?? "") && opacity <= 100 ? Number(opacity) : null);
  for (const name of ["smooth", "pinned"]) take(name, one(name, ["0", "1"]) && fields.get(name) === "1");
  const kept = viewOf((fields.get("kept") ?? "").split("."), header);
  take("kept", Object.values(kept).includes(null) || !hasColumn(header, kept.layer, kept.head) ? null : kept);
  return { ...result, unknown };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Whether a picture passes a filter: "all", "right", "wrong", "class NAME" or "confused TRUE, PREDICTED". */
function passes(filter, label, predicted) {
  if (filter === "right" || filter === "wrong") return label !== null && predicted !== null && (label === predicted) === (filter === "right");
  if (filter.startsWith("class ")) return label === filter.slice(6);
  return !filter.startsWith("confused ") || (label !== null && predicted !== null && label !== predicted && filter === `confused ${label}, ${predicted}`);
}

const pure = { half, bytesOf, onRelativeScale, entropyOf, rolloutStep, distanceOf, tokenAt, tokenIn, rowOf, addressOfToken,
  tokenOfAddress, referenceOf, addressOf, stateOf, filtersOf, columnsOf, doublingsBetween, totalVariation, passes, Attention };
