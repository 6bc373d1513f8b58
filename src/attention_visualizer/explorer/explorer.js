// The page: draws the attention and does what the hand asks for. Nothing is fetched, nothing is stored; what is shown is in
// the address.

const element = (id) => document.getElementById(id);
const made = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children); // strings become text, whatever they hold
  return node;
};
const percent = (value) => (value < 0.001 && value > 0 ? "< 0.1%" : `${(100 * value).toFixed(1)}%`);

class Page {
  constructor(header, attention, images) {
    this.header = header;
    this.layout = header.layout;
    this.attention = attention;
    this.images = images; // by group and picture
    this.tables = { relative: bytesOf(header.colors.relative), share: bytesOf(header.colors.share),
      difference: bytesOf(header.colors.difference) };
    this.hasRollout = this.layout.tokens <= 400; // of more, it takes a browser seconds
    const group = header.groups[0];
    const first = this.layout.class_token === "read" ? 0
      : this.layout.prefix + Math.floor(this.layout.grid[0] / 2) * this.layout.grid[1] + Math.floor(this.layout.grid[1] / 2);
    this.state = stateOf(location.hash, header, { group: 0, picture: 0, moment: group.moments.length - 1,
      layer: this.layout.layers - 1, head: this.layout.heads, query: first, direction: "row", colors: "relative",
      opacity: 65, smooth: false, filter: "all", kept: null, pinned: false });
    this.shift = false;
    this.grid = Object.assign(document.createElement("canvas"), { width: this.layout.grid[1], height: this.layout.grid[0] });
    this.build();
    this.listen();
    this.draw();
  }

  /** Make another state the one that is shown. */
  show(changes) {
    const { group } = this.state;
    Object.assign(this.state, changes);
    if (this.state.group !== group && changes.moment === undefined) this.state.moment = this.header.groups[this.state.group].moments.length - 1;
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
        const button = made("button", { type: "button", className: "picture", title: picture.name },
          made("img", { src: picture.png, alt: picture.name }), made("span", { className: "verdict" }));
        button.onclick = () => this.show({ group: number, picture: index });
        this.pictures.push({ group: number, picture: index, button });
        strip.append(button);
      });
      element("pictures").append(made("div", {}, made("h2", {}, group.title), strip));
    });
    this.tokens = Array.from({ length: layout.prefix }, (_, token) => {
      const button = made("button", { type: "button" }, made("i"), this.nameOfToken(token), made("span"));
      button.onpointerenter = (event) => event.pointerType === "mouse" && !this.state.pinned && this.show({ query: token });
      button.onclick = () => this.pin(token);
      return button;
    });
    element("tokens").replaceChildren(...this.tokens);
    const columns = layout.heads + (this.hasRollout ? 2 : 1), heads = element("heads");
    heads.style.gridTemplateColumns = `max-content repeat(${columns}, minmax(28px, ${columns > 8 ? 64 : 80}px))`;
    heads.append(made("span"), ...Array.from({ length: columns }, (_, head) =>
      made("span", { className: "head" }, head < layout.heads ? `head ${head + 1}` : ["mean", "rollout"][head - layout.heads])));
    this.thumbnails = [];
    for (let layer = 0; layer < layout.layers; layer++) {
      heads.append(made("span", { className: "layer" }, `layer ${layer + 1}`));
      for (let head = 0; head < columns; head++) {
        const canvas = made("canvas", { width: layout.grid[1], height: layout.grid[0] });
        const button = made("button", { type: "button", className: "thumbnail", title: this.nameOfMap(layer, head) }, canvas);
        button.setAttribute("aria-label", this.nameOfMap(layer, head));
        button.onclick = () => this.show({ layer, head });
        button.onkeydown = (event) => this.moveInTable(event, layer, head, columns);
        heads.append(button);
        const context = canvas.getContext("2d");
        this.thumbnails.push({ layer, head, button, context, pixels: context.createImageData(canvas.width, canvas.height) });
      }
    }
    this.columns = columns;
  }

  nameOfToken(token) {
    if (token >= this.layout.prefix) {
      const patch = token - this.layout.prefix;
      return `patch in row ${Math.floor(patch / this.layout.grid[1]) + 1}, column ${(patch % this.layout.grid[1]) + 1}`;
    }
    const isClass = token === 0 && this.layout.class_token !== "absent";
    return isClass ? "class token" : `prefix token ${token + 1}`;
  }

  nameOfMap(layer, head) {
    if (head < this.layout.heads) return `head ${layer + 1}.${head + 1}`;
    return head === this.layout.heads ? `layer ${layer + 1}, mean over heads` : `rollout up to layer ${layer + 1}`;
  }

  moveInTable(event, layer, head, columns) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!moves[event.key]) return;
    event.preventDefault();
    const [down, across] = moves[event.key];
    const target = [Math.min(Math.max(layer + down, 0), this.layout.layers - 1), Math.min(Math.max(head + across, 0), columns - 1)];
    this.show({ layer: target[0], head: target[1] });
    this.thumbnails[target[0] * columns + target[1]].button.focus();
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
      const { prefix, grid, tokens } = this.layout;
      const moves = { ArrowUp: -grid[1], ArrowDown: grid[1], ArrowLeft: -1, ArrowRight: 1 };
      if (event.key in moves) {
        const from = Math.max(this.state.query, prefix), target = this.state.query < prefix ? prefix : from + moves[event.key];
        if (target >= prefix && target < tokens) this.show({ query: target });
      } else if (event.key === "Home" && prefix) this.show({ query: 0 });
      else if (event.key === "Enter" || event.key === " ") this.pin(this.state.query);
      else if (event.key === "Escape") this.show({ pinned: false });
      else return;
      event.preventDefault();
    };
    const shift = (isHeld) => (event) => {
      if (event.key !== "Shift" || this.shift === isHeld) return;
      this.shift = isHeld;
      this.show({});
    };
    addEventListener("keydown", shift(true));
    addEventListener("keyup", shift(false));
    addEventListener("blur", () => this.shift && ((this.shift = false), this.show({})));
    addEventListener("keydown", (event) => {
      if (event.key === "," || event.key === ".") this.step(event.key === "." ? 1 : -1);
    });
    addEventListener("hashchange", () => location.hash !== this.address && this.show(stateOf(location.hash, this.header, this.state)));
    addEventListener("resize", () => this.show({}));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.show({}));
    element("moment").oninput = (event) => this.show({ moment: Number(event.target.value) });
    element("play").onclick = () => this.play();
    element("speed").onchange = () => this.timer && (this.play(), this.play());
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
    element("end").onclick = () => this.show({ kept: null });
    element("copy").onclick = () => this.copied(this.csv(), "numbers");
    element("link").onclick = () => this.copied(location.href, "link");
    element("save").onclick = () => this.save();
    const chart = element("chart");
    const toMoment = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = chart.getBoundingClientRect(), { left, width } = this.frame(box.width);
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

  /** Begin to play, from the start where the end is shown, or stop. */
  play() {
    clearInterval(this.timer);
    const isPlaying = Boolean(this.timer), last = this.header.groups[this.state.group].moments.length - 1;
    this.timer = null;
    element("play").textContent = isPlaying ? "Play" : "Pause";
    if (isPlaying) return;
    if (this.state.moment === last) this.show({ moment: 0 });
    this.timer = setInterval(() => (this.state.moment < last ? this.step(1) : this.play()), 1000 / Number(element("speed").value));
  }

  // --- drawn at each change ---

  draw() {
    const { state, header, layout } = this, group = header.groups[state.group], moment = group.moments[state.moment];
    const shown = { ...state, direction: this.direction };
    this.values = this.attention.of(shown, state.layer, state.head);
    for (const { layer, head, button, context, pixels } of this.thumbnails) {
      const values = this.attention.of(shown, layer, head);
      this.largest = largestOf(this, values);
      paint(this, values, pixels.data, this.tables[state.colors], (value) => this.place(value));
      context.putImageData(pixels, 0, 0);
      const isShown = layer === state.layer && head === state.head;
      button.setAttribute("aria-pressed", isShown);
      button.tabIndex = isShown ? 0 : -1;
    }
    const found = new Set(["all"]);
    for (const { group: of, picture, button } of this.pictures) {
      const last = header.groups[of].moments.at(-1), at = of === state.group ? moment : last;
      const label = header.groups[of].pictures[picture].label, predicted = at.predicted[picture];
      if (label !== null) found.add(`class ${label}`);
      if (label !== null && predicted !== null) found.add(label === predicted ? "right" : "wrong");
      if (label !== null && predicted !== null && label !== predicted) found.add(`confused ${label}, ${predicted}`);
      button.hidden = !passes(state.filter, label, predicted);
      const isRight = label === null || predicted === null ? null : label === predicted;
      button.lastChild.textContent = predicted === null ? (label ?? "") : label === null || isRight ? predicted : `${label} → ${predicted}`;
      button.classList.toggle("wrong", isRight === false);
      button.setAttribute("aria-pressed", of === state.group && picture === state.picture);
    }
    this.drawFilter(found.add(state.filter));
    this.tokens.forEach((button, token) => {
      button.firstChild.style.background = this.color(this.values[token]);
      button.lastChild.textContent = percent(this.values[token]);
      button.setAttribute("aria-pressed", token === state.query);
      button.classList.toggle("pinned", this.state.pinned && token === state.query);
    });
    this.largest = largestOf(this, this.values);
    drawComparison(this, shown);
    element("caption").textContent = this.caption();
    this.drawMap(element("map"));
    drawScale(this);
    this.drawNumbers();
    element("time").hidden = group.moments.length < 2;
    if (group.moments.length > 1) drawChart(this, group, moment);
    for (const name of ["direction", "colors", "opacity"]) element(name).value = state[name];
    element("smooth").checked = state.smooth;
    element("done").textContent = "";
    this.address = addressOf(state, header);
    clearTimeout(this.addressTimer); // browsers allow few changes of the address in a second
    this.addressTimer = setTimeout(() => location.protocol !== "about:" && history.replaceState(null, "", this.address), 150);
    element("explorer").dataset.drawn = String(Number(element("explorer").dataset.drawn ?? 0) + 1);
  }

  drawFilter(found) {
    const names = ["all", "right", "wrong", ...[...found].filter((name) => /^(class|confused) /.test(name)).sort()];
    const text = (name) => (name === "all" ? "all images" : name.replace(/^confused (.*)$/s, "$1 (true, predicted)"));
    if (names.join() !== this.filters) {
      this.filters = names.join();
      element("filter").replaceChildren(...names.map((name) => made("option", { value: name, disabled: !found.has(name) }, text(name))));
    }
    element("filter").value = this.state.filter;
  }

  caption() {
    const { state } = this, group = this.header.groups[state.group], moment = group.moments[state.moment];
    const picture = group.pictures[state.picture], predicted = moment.predicted[state.picture];
    const probability = moment.probability[state.picture];
    const said = [picture.label === null ? null : `class ${picture.label}`,
      predicted === null ? null : `predicted ${predicted}` + (probability === null ? "" : ` (${percent(probability)})`)];
    const query = this.direction === "row" ? `what the ${this.nameOfToken(state.query)} attends to`
      : `what attends to the ${this.nameOfToken(state.query)}`;
    return [[picture.name, ...said.filter((each) => each !== null)].join(", "), this.nameOfMap(state.layer, state.head),
      query + (this.state.pinned ? ", pinned" : ""), moment.title].join(" · ");
  }

  /** Return the place of a value in the colour table, 0 to 255. */
  place(value) {
    const share = this.state.colors === "relative"
      ? onRelativeScale(value, this.layout.tokens, this.header.doublings) : value / (this.largest || 1);
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
      canvas.style.width = `${shown / ratio}px`;
    }
    drawOverlay(this, canvas.getContext("2d"), canvas.width, canvas.height);
    canvas.setAttribute("aria-label", `Map of ${layout.grid[0]} by ${layout.grid[1]} patches. ${this.caption()}`);
  }

  drawNumbers() {
    const { state, layout, values } = this, numbers = [];
    const largest = values.indexOf(values.reduce((one, other) => Math.max(one, other)));
    if (this.direction === "row") {
      const entropy = state.head < layout.heads
        ? this.attention.entropy(state.group, state.moment, state.picture, state.layer, state.head, state.query) : entropyOf(values);
      numbers.push(["entropy", `${entropy.toFixed(2)} nats of ${Math.log(layout.tokens).toFixed(2)}`]);
      numbers.push(["effective tokens", `${Math.exp(entropy).toFixed(1)} of ${layout.tokens}`]);
      numbers.push(["largest", `${percent(values[largest])}, ${this.nameOfToken(largest)}`]);
      numbers.push(["itself", percent(values[state.query])]);
      if (state.query >= layout.prefix) numbers.push(["mean distance", `${distanceOf(values, state.query, layout).toFixed(1)} pixels`]);
    } else {
      const mean = values.reduce((one, other) => one + other) / layout.tokens;
      numbers.push(["receives", `${percent(mean)} of all attention, ${(mean * layout.tokens).toFixed(2)}× uniform`]);
      numbers.push(["most from", `${this.nameOfToken(largest)}, ${percent(values[largest])} of its attention`]);
    }
    element("numbers").replaceChildren(...numbers.map(([name, text]) => made("div", {}, made("dt", {}, name), made("dd", {}, text))));
  }

  frame(width) {
    return { left: 34, top: 8, width: width - 34 - 84, height: 108 };
  }

  // --- taken along ---

  csv() {
    const { layout, values } = this, lines = [`# ${this.header.title}; ${this.caption()}`.replace(/[\r\n]+/g, " "), "token,row,column,weight"];
    values.forEach((value, token) => {
      const patch = token - layout.prefix, isPatch = patch >= 0;
      lines.push([token, isPatch ? Math.floor(patch / layout.grid[1]) + 1 : "", isPatch ? (patch % layout.grid[1]) + 1 : "", value.toPrecision(4)].join(","));
    });
    return lines.join("\n") + "\n";
  }

  async copied(text, what) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = made("textarea", { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    element("done").textContent = `${what} copied`;
  }

  save() {
    savedPicture(this).toBlob((blob) => {
      const link = made("a", { href: URL.createObjectURL(blob), download: "attention.png" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      element("done").textContent = "attention.png saved";
    });
  }
}

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
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
    element("explorer").hidden = false;
    window.explorer = { page: new Page(header, attention, images), pure, milliseconds: performance.now() - began };
  } catch (error) {
    element("failure").textContent = `This page cannot be shown: ${error.message}. It needs a browser of 2023 or later.`;
    element("failure").hidden = false;
    throw error;
  }
}

begin();
