// The page: does what the hand asks for. Nothing is fetched, nothing is stored; what is shown is in the address.

const element = (id) => document.getElementById(id);
const made = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children); // strings become text, whatever they hold
  return node;
};

class Page {
  constructor(header, attention, images) {
    this.header = header;
    this.layout = header.layout;
    this.attention = attention;
    this.images = images; // by group and picture
    this.tables = { relative: bytesOf(header.colors.relative), share: bytesOf(header.colors.share),
      difference: bytesOf(header.colors.difference) };
    this.columns = columnsOf(this.layout);
    this.filters = filtersOf(header);
    this.moments = header.groups.map(({ moments }) => moments.length - 1); // that were last shown of each group
    const group = header.groups[0];
    const first = this.layout.class_token === "read" ? 0
      : this.layout.prefix + Math.floor(this.layout.grid[0] / 2) * this.layout.grid[1] + Math.floor(this.layout.grid[1] / 2);
    this.usual = { group: 0, picture: 0, moment: group.moments.length - 1,
      layer: this.layout.layers - 1, head: this.layout.heads, query: first, direction: "row", colors: "relative",
      opacity: 65, smooth: false, filter: "all", kept: null, pinned: false, unknown: [] };
    this.state = stateOf(location.hash, header, this.usual);
    this.shift = false;
    this.grid = Object.assign(document.createElement("canvas"), { width: this.layout.grid[1], height: this.layout.grid[0] });
    this.build();
    this.listen();
    this.draw();
  }

  /** Make another state the one that is shown. */
  show(changes) {
    const { group } = this.state;
    Object.assign(this.state, { unknown: [] }, changes);
    if (this.state.group !== group) {
      this.stop();
      if (changes.moment === undefined) this.state.moment = this.moments[this.state.group];
    }
    this.moments[this.state.group] = this.state.moment;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  get direction() {
    const other = { row: "column", column: "row" };
    return this.shift ? other[this.state.direction] : this.state.direction;
  }

  // --- built once ---

  build() {
    const { header, layout } = this;
    element("facts").replaceChildren(...header.facts.map(([label, text]) => made("span", {}, made("b", {}, label), ` ${text}`)));
    element("warnings").replaceChildren(...header.warnings.map((text) => made("p", { className: "warning" }, made("b", {}, "Warning."), ` ${text}`)));
    this.pictures = [];
    header.groups.forEach((group, number) => {
      const strip = made("div", { className: "strip" });
      group.pictures.forEach((picture, index) => {
        const button = made("button", { type: "button", className: "picture" },
          made("img", { src: picture.png, alt: "" }), made("span", { className: "verdict" }));
        button.onclick = () => this.show({ group: number, picture: index });
        this.pictures.push({ group: number, picture: index, button });
        strip.append(button);
      });
      element("pictures").append(made("div", {}, made("h2", {}, group.title), strip));
    });
    this.tokens = Array.from({ length: layout.prefix }, (_, token) => {
      const button = made("button", { type: "button" }, made("i"), nameOfToken(token, this.layout), made("span"));
      button.onpointerenter = (event) => event.pointerType === "mouse" && !this.state.pinned && this.show({ query: token });
      button.onclick = () => this.pin(token);
      button.onkeydown = (event) => event.key === "Escape" && this.show({ pinned: false });
      return button;
    });
    element("tokens").replaceChildren(...this.tokens);
    const columns = this.columns.length, heads = element("heads");
    element("filter").replaceChildren(...this.filters.map((name) => made("option", { value: name },
      name === "all" ? "all" : name.replace(/^confused (.*)$/s, "$1 (true, predicted)"))));
    element("link").hidden = location.protocol === "about:"; // a notebook's cell has no address of its own
    heads.style.gridTemplateColumns = `max-content repeat(${columns}, minmax(28px, ${columns > 8 ? 64 : 80}px))`;
    heads.append(made("span"), ...Array.from({ length: columns }, (_, head) =>
      made("span", { className: "head" }, head < layout.heads ? `head ${head + 1}` : ["mean", "rollout"][head - layout.heads])));
    this.thumbnails = [];
    for (let layer = 0; layer < layout.layers; layer++) {
      heads.append(made("span", { className: "layer" }, `layer ${layer + 1}`));
      for (let head = 0; head < columns; head++) {
        const canvas = made("canvas", { width: layout.grid[1], height: layout.grid[0] });
        const button = made("button", { type: "button", className: "thumbnail", title: nameOfMap(layer, head, this.layout) }, canvas);
        button.setAttribute("aria-label", nameOfMap(layer, head, this.layout));
        button.onclick = () => this.show({ layer, head });
        button.onkeydown = (event) => this.moveInTable(event, layer, head, columns);
        heads.append(button);
        const context = canvas.getContext("2d");
        this.thumbnails.push({ layer, head, button, context, pixels: context.createImageData(canvas.width, canvas.height) });
      }
    }
  }

  moveInTable(event, layer, head, columns) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!moves[event.key]) return;
    event.preventDefault();
    const [down, across] = moves[event.key];
    const target = [Math.min(Math.max(layer + down, 0), this.layout.layers - 1), Math.min(Math.max(head + across, 0), columns - 1)];
    this.show({ layer: target[0], head: target[1] });
    this.thumbnails[target[0] * columns + target[1]].button.focus();
    this.speak();
  }

  pin(token) {
    this.show({ query: token, pinned: !(this.state.pinned && this.state.query === token) });
  }

  listen() {
    const map = element("map");
    const at = (event) => {
      const box = map.getBoundingClientRect();
      return tokenAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, this.layout);
    };
    map.onpointermove = (event) => {
      const token = at(event);
      if (token !== null && token !== this.state.query && !this.state.pinned && event.pointerType === "mouse") this.show({ query: token });
    };
    map.onclick = (event) => at(event) !== null && this.pin(at(event));
    map.onkeydown = (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const { prefix, grid } = this.layout, patch = this.state.query - prefix;
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (event.key in moves) {
        const [row, column] = [Math.floor(patch / grid[1]) + moves[event.key][0], (patch % grid[1]) + moves[event.key][1]];
        if (patch < 0) this.show({ query: prefix });
        else if (row >= 0 && row < grid[0] && column >= 0 && column < grid[1]) this.show({ query: prefix + row * grid[1] + column });
      } else if (event.key === "Home" && prefix) this.show({ query: 0 });
      else if (event.key === "Enter" || event.key === " ") this.pin(this.state.query);
      else if (event.key === "Escape") this.show({ pinned: false });
      else return;
      event.preventDefault();
      this.speak();
    };
    const shift = (isHeld) => {
      if (this.shift === isHeld) return;
      this.shift = isHeld;
      this.show({});
    };
    addEventListener("keydown", (event) => {
      const isTyping = event.target instanceof HTMLSelectElement || event.altKey || event.ctrlKey || event.metaKey;
      if (event.key === "Shift" && element("stage").matches(":hover, :focus-within")) shift(true);
      else if (event.key === "Tab") shift(false);
      else if (!isTyping && (event.key === "," || event.key === ".")) {
        this.stop();
        this.step(event.key === "." ? 1 : -1);
        this.speak();
      }
    });
    addEventListener("keyup", (event) => event.key === "Shift" && shift(false));
    addEventListener("blur", () => shift(false));
    addEventListener("hashchange", () => location.hash !== this.address && this.show(stateOf(location.hash, this.header, this.usual)));
    addEventListener("resize", () => this.show({}));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.show({}));
    element("moment").oninput = (event) => {
      this.stop();
      this.show({ moment: Number(event.target.value) });
    };
    element("play").onclick = () => (this.timer ? this.stop() : this.play());
    element("speed").onchange = () => this.timer && this.play();
    for (const name of ["direction", "colors"]) element(name).onchange = (event) => this.show({ [name]: event.target.value });
    element("opacity").oninput = (event) => this.show({ opacity: Number(event.target.value) });
    element("smooth").onchange = (event) => this.show({ smooth: event.target.checked });
    element("filter").onchange = (event) => this.show({ filter: event.target.value });
    element("keep").onclick = () => {
      const { group, picture, moment, layer, head } = this.state;
      this.show({ kept: { group, picture, moment, layer, head } });
    };
    element("swap").onclick = () => {
      const { group, picture, moment, layer, head, kept } = this.state;
      this.show({ ...kept, kept: { group, picture, moment, layer, head } });
    };
    element("end").onclick = () => {
      this.show({ kept: null });
      element("keep").focus();
    };
    element("copy").onclick = () => this.copied(csvOf(this), "numbers");
    element("link").onclick = () => this.copied(location.href.split("#")[0] + addressOf(this.state, this.header), "link");
    element("png").onclick = () => savedPicture(this).toBlob((blob) => this.saved(blob, "attention.png"));
    element("svg").onclick = () => this.saved(new Blob([savedDrawing(this)], { type: "image/svg+xml" }), "attention.svg");
    const chart = element("chart");
    const toMoment = (event) => {
      if (event.button > 0 || (event.type === "pointermove" && !event.buttons)) return;
      if (event.type === "pointerdown") chart.setPointerCapture(event.pointerId);
      this.stop();
      const box = chart.getBoundingClientRect(), { left, width } = chartFrame(box.width);
      const last = this.header.groups[this.state.group].moments.length - 1;
      this.show({ moment: Math.min(Math.max(Math.round(((event.clientX - box.left - left) / width) * last), 0), last) });
    };
    chart.onpointerdown = toMoment;
    chart.onpointermove = toMoment;
  }

  step(by) {
    const last = this.header.groups[this.state.group].moments.length - 1;
    this.show({ moment: Math.min(Math.max(this.state.moment + by, 0), last) });
  }

  /** Play to the end, from the start where the end is shown. */
  play() {
    this.stop();
    const last = this.header.groups[this.state.group].moments.length - 1;
    if (this.state.moment === last) this.show({ moment: 0 });
    this.timer = setInterval(() => (this.state.moment < last ? this.step(1) : this.stop()), 1000 / Number(element("speed").value));
    element("play").textContent = "Pause";
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    element("play").textContent = "Play";
  }

  /** Have a screen reader say what a key has led to, once it rests. */
  speak() {
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => {
      const numbers = [...element("numbers").children].map((each) => `${each.firstChild.textContent} ${each.lastChild.textContent}`);
      element("spoken").textContent = `${this.caption()}. ${numbers.join(", ")}`;
    }, 400);
  }

  // --- drawn at each change ---

  draw() {
    const { state, header, layout } = this, group = header.groups[state.group], moment = group.moments[state.moment];
    const shown = { ...state, direction: this.direction };
    this.values = this.attention.of(shown, state.layer, state.head);
    for (const { layer, head, button, context, pixels } of this.thumbnails) {
      const values = this.attention.of(shown, layer, head);
      const largest = largestOf(this, values);
      paint(this, values, pixels.data, this.tables[state.colors], (value) => this.place(value, largest));
      context.putImageData(pixels, 0, 0);
      const isShown = layer === state.layer && head === state.head;
      button.setAttribute("aria-pressed", isShown);
      button.tabIndex = isShown ? 0 : -1;
    }
    this.largest = largestOf(this, this.values);
    let passing = 0;
    for (const { group: of, picture, button } of this.pictures) {
      const last = header.groups[of].moments.at(-1), at = of === state.group ? moment : last;
      const label = header.groups[of].pictures[picture].label, predicted = at.predicted[picture];
      const isShown = of === state.group && picture === state.picture, name = header.groups[of].pictures[picture].name;
      button.hidden = !isShown && !passes(state.filter, label, predicted);
      button.classList.toggle("other", isShown && !passes(state.filter, label, predicted));
      passing += passes(state.filter, label, predicted);
      const isRight = label === null || predicted === null ? null : label === predicted;
      button.lastChild.textContent = predicted === null ? (label ?? "") : label === null || isRight ? predicted : `${label} → ${predicted}`;
      button.classList.toggle("wrong", isRight === false);
      button.title = [name, button.lastChild.textContent, isRight === false ? "wrong" : ""].filter(Boolean).join(", ");
      button.setAttribute("aria-label", button.title);
      button.setAttribute("aria-pressed", isShown);
    }
    const notes = state.unknown.map((each) => `The address asks for ${each}, which is not here.`);
    if (state.filter !== "all" && !passing) notes.push("No image passes the filter at this moment.");
    element("notice").textContent = notes.join(" ");
    element("own-scales").hidden = state.colors === "relative";
    this.tokens.forEach((button, token) => {
      button.firstChild.style.background = this.color(this.values[token]);
      button.lastChild.textContent = percent(this.values[token]);
      button.setAttribute("aria-pressed", token === state.query);
      button.classList.toggle("pinned", this.state.pinned && token === state.query);
    });
    drawComparison(this, shown);
    element("caption").textContent = this.caption();
    this.drawMap(element("map"));
    drawScale(this);
    this.drawNumbers();
    element("time").hidden = group.moments.length < 2;
    if (group.moments.length > 1) drawChart(this, group, moment);
    for (const name of ["direction", "colors", "opacity", "filter"]) element(name).value = state[name];
    element("smooth").checked = state.smooth;
    this.address = addressOf(state, header);
    clearTimeout(this.addressTimer); // browsers allow few changes of the address in a second
    this.addressTimer = setTimeout(() => location.protocol !== "about:" && history.replaceState(null, "", this.address), 150);
  }

  caption() {
    const { state } = this, group = this.header.groups[state.group], moment = group.moments[state.moment];
    const picture = group.pictures[state.picture], predicted = moment.predicted[state.picture];
    const probability = moment.probability[state.picture];
    const said = [picture.label === null ? null : `class ${picture.label}`,
      predicted === null ? null : `predicted ${predicted}` + (probability === null ? "" : ` (${percent(probability)})`)];
    const query = this.direction === "row" ? `what the ${nameOfToken(state.query, this.layout)} attends to`
      : `what attends to the ${nameOfToken(state.query, this.layout)}`;
    return [[picture.name, ...said.filter((each) => each !== null)].join(", "), nameOfMap(state.layer, state.head, this.layout),
      query + (this.state.pinned ? ", pinned" : ""), moment.title].join(" · ");
  }

  /** Return the place of a value in the colour table, 0 to 255; of shares, `largest` is at its end. */
  place(value, largest = this.largest) {
    const share = this.state.colors === "relative"
      ? onRelativeScale(value, this.layout.tokens, this.header.doublings) : value / (largest || 1);
    return Math.round(255 * Math.min(1, share));
  }

  color(value) {
    const table = this.tables[this.state.colors], at = 3 * this.place(value);
    return `rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})`;
  }

  drawMap(canvas) {
    const { state, layout } = this, [height, width] = layout.image;
    const side = canvas.parentElement.clientWidth, ratio = devicePixelRatio || 1;
    const shown = Math.round(Math.min(side, 460) * ratio);
    if (canvas.width !== shown) {
      canvas.width = shown;
      canvas.height = Math.round((shown * height) / width);
    }
    canvas.style.width = `${shown / ratio}px`;
    drawOverlay(this, canvas.getContext("2d"), canvas.width, canvas.height, this.values, state, this.largest);
    canvas.setAttribute("aria-label", `Map of ${layout.grid[0]} by ${layout.grid[1]} patches. ${this.caption()}`);
  }

  drawNumbers() {
    const { state, layout, values } = this, numbers = [];
    const largest = values.indexOf(values.reduce((one, other) => Math.max(one, other)));
    if (largest < 0) numbers.push(["no numbers", "the attention is not a number here"]);
    else if (this.direction === "row") {
      const entropy = this.attention.entropyOfView(state, state.query, values);
      const of = ["", " of the mean map", " of the rollout"][Math.max(0, state.head - layout.heads + 1)];
      numbers.push([`entropy${of}`, `${entropy.toFixed(2)} nats of ${Math.log(layout.tokens).toFixed(2)}`]);
      numbers.push(["effective tokens", `${Math.exp(entropy).toFixed(1)} of ${layout.tokens}`]);
      numbers.push(["largest", `${percent(values[largest])}, ${nameOfToken(largest, this.layout)}`]);
      numbers.push(["itself", percent(values[state.query])]);
      if (state.query >= layout.prefix) numbers.push(["mean distance", `${distanceOf(values, state.query, layout).toFixed(1)} pixels`]);
    } else {
      const mean = values.reduce((one, other) => one + other) / layout.tokens;
      numbers.push(["receives", `${percent(mean)} of all attention, ${(mean * layout.tokens).toFixed(2)}× uniform`]);
      numbers.push(["most from", `${nameOfToken(largest, this.layout)}, ${percent(values[largest])} of its attention`]);
    }
    element("numbers").replaceChildren(...numbers.map(([name, text]) => made("div", {}, made("dt", {}, name), made("dd", {}, text))));
  }

  // --- taken along ---

  async copied(text, what) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = made("textarea", { value: text });
      document.body.append(area);
      area.select();
      const isCopied = document.execCommand("copy");
      area.remove();
      if (!isCopied) return this.say(`the browser does not let ${what} be copied`);
    }
    this.say(`${what} copied`);
  }

  /** Say for a while what was done. */
  say(text) {
    element("done").textContent = text;
    clearTimeout(this.said);
    this.said = setTimeout(() => (element("done").textContent = ""), 4000);
  }

  saved(blob, name) {
    const link = made("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    this.say(`${name} saved`);
  }
}

async function begin() {
  const began = performance.now();
  try {
    const header = JSON.parse(element("header").textContent);
    const attention = new Attention(header, await inflated(bytesOf(element("rows").textContent)));
    element("rows").remove();
    const load = async (picture) => {
      const image = made("img", { src: picture.png });
      await image.decode();
      return image;
    };
    const images = await Promise.all(header.groups.map((group) => Promise.all(group.pictures.map(load))));
    element("content").hidden = false;
    window.explorer = { page: new Page(header, attention, images), pure, milliseconds: performance.now() - began };
  } catch (error) {
    element("failure").textContent = `This page cannot be shown: ${error.message}. It needs a browser of 2023 or later.`;
    element("failure").hidden = false;
    throw error;
  }
}

begin();
