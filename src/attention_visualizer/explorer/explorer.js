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
    this.layout = referenceOf(header); // that queries are chosen in
    this.numHeads = headsOf(header);
    this.attention = attention;
    this.images = images; // by group and picture
    this.tables = { relative: bytesOf(header.colors.relative), share: bytesOf(header.colors.share),
      difference: bytesOf(header.colors.difference) };
    this.columns = columnsOf(header);
    this.filters = filtersOf(header);
    this.moments = header.groups.map(({ moments }) => moments.length - 1); // that were last shown of each group
    const group = header.groups[0];
    const { prefix, grid, class_token } = this.layout, having = attention.layouts.filter((layout) => layout.prefix > 0).length;
    const isClass = class_token === "read" && 2 * having >= attention.layouts.length; // which most layers have
    const first = isClass ? 0 : prefix + Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2);
    this.usual = { group: 0, picture: 0, moment: group.moments.length - 1,
      layer: header.layers.length - 1, head: this.numHeads, query: first, item: 0, direction: "row", colors: "relative",
      opacity: 65, smooth: false, filter: "all", kept: null, pinned: false, unknown: [] };
    this.state = stateOf(location.hash, header, this.usual);
    this.shift = false;
    this.grid = document.createElement("canvas"); // a pixel for each cell
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

  /** The direction that is asked for: Shift, held, is the other one. */
  get shiftedDirection() {
    const other = { row: "column", column: "row" };
    return this.shift ? other[this.state.direction] : this.state.direction;
  }

  /** The direction of the map that is shown: of a list of queries, always what they attend to. */
  get direction() {
    return this.attention.layouts[this.state.layer].are_queries_patches ? this.shiftedDirection : "row";
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
        button.onkeydown = (event) => this.moveInPictures(event, button);
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
    const columns = this.columns.length, heads = element("heads"), { numHeads } = this;
    element("filter").replaceChildren(...this.filters.map((name) => made("option", { value: name },
      name === "all" ? "all" : name.replace(/^confused (.*)$/s, "$1 (true, predicted)"))));
    element("link").hidden = location.protocol === "about:"; // a notebook's cell has no address of its own
    // With many heads, or not as many in each layer, what all layers have comes first.
    const all = Array.from({ length: columns }, (_, column) => column), isShort = numHeads > 12;
    this.order = isShort || header.layers.some((layer) => layer.heads < numHeads) ? [...all.slice(numHeads), ...all.slice(0, numHeads)] : all;
    heads.style.gridTemplateColumns = `max-content repeat(${columns}, minmax(${isShort ? 28 : 54}px, ${columns > 8 ? 64 : 80}px))`;
    this.headings = this.order.map((head) =>
      made("span", { className: "head" }, head < numHeads ? `${isShort ? "" : "head "}${head + 1}` : this.columns[head]));
    heads.append(made("span"), ...this.headings);
    this.thumbnails = [];
    header.layers.forEach(({ name, number }, layer) => {
      heads.append(made("span", { className: "layer", title: name }, `layer ${number}`));
      for (const head of this.order) {
        if (!hasColumn(header, layer, head)) {
          heads.append(made("span"));
          continue;
        }
        const canvas = made("canvas"), text = nameOfMap(layer, head, header);
        const button = made("button", { type: "button", className: "thumbnail", title: `${text}, ${name}` }, canvas);
        button.setAttribute("aria-label", text);
        Object.assign(canvas.style, { aspectRatio: header.image[1] / header.image[0], objectFit: header.layouts[header.layers[layer].layout].grid ? "contain" : "fill" });
        button.onclick = () => this.show({ layer, head });
        button.onkeydown = (event) => this.moveInTable(event, layer, head);
        heads.append(button);
        this.thumbnails.push({ layer, head, button, context: canvas.getContext("2d") });
      }
    });
    element("item").max = queriesInList(header);
    const isPlain = header.layouts.length === 1 && header.layouts[0].are_queries_patches && !header.layouts[0].key_of_patch;
    element("about-layer").classList.toggle("plain", isPlain); // seldom anything is said there
  }

  /** Whether a column is known of the group that is shown: methods are known of some. */
  isKnown(column) {
    const name = this.columns[column];
    return !methodsOf(this.header).includes(name) || this.header.groups[this.state.group].methods.includes(name);
  }

  /** Go to the next picture, or the one before, that passes the filter. */
  moveInPictures(event, button) {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const there = this.pictures.filter((each) => !each.button.hidden), next = there[there.findIndex((each) => each.button === button) + by];
    if (!next) return;
    this.show({ group: next.group, picture: next.picture });
    next.button.focus();
    this.speak();
  }

  moveInTable(event, layer, head) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!moves[event.key]) return;
    event.preventDefault();
    const down = Math.min(Math.max(layer + moves[event.key][0], 0), this.header.layers.length - 1);
    const there = this.order.filter((each) => hasColumn(this.header, down, each) && this.isKnown(each)), before = this.order.indexOf(head);
    const at = moves[event.key][1] ? there.indexOf(head) + moves[event.key][1] : there.findLastIndex((each) => this.order.indexOf(each) <= before);
    const across = there[Math.min(Math.max(at, 0), there.length - 1)];
    this.show({ layer: down, head: across });
    this.thumbnails.find((each) => each.layer === down && each.head === across).button.focus();
    this.speak();
  }

  pin(query, item = this.state.item) {
    this.show({ query, item, pinned: !(this.state.pinned && this.state.query === query && this.state.item === item) });
  }

  listen() {
    const map = element("map");
    const at = (event) => {
      const box = map.getBoundingClientRect(), down = (event.clientY - box.top) / box.height, { layout, grid } = this.map;
      if (!layout.grid) return { item: Math.min(Math.max(Math.floor(down * grid[0]), 0), grid[0] - 1) };
      if (!layout.are_queries_patches) return { query: null }; // they are chosen in the list
      return { query: tokenAt((event.clientX - box.left) / box.width, down, this.layout, this.header.image) };
    };
    map.onpointermove = (event) => {
      const [[name, value]] = Object.entries(at(event));
      if (value !== null && value !== this.state[name] && !this.state.pinned && event.pointerType === "mouse") this.show({ [name]: value });
    };
    map.onclick = (event) => {
      const { item, query } = at(event);
      if (query !== null) this.pin(query ?? this.state.query, item);
    };
    map.onkeydown = (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const { prefix } = this.layout;
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (event.key in moves) this.move(...moves[event.key]);
      else if (event.key === "Home" && prefix) this.show({ query: 0 });
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
    element("item").oninput = (event) => this.show({ item: Number(event.target.value) - 1 });
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
    element("copy").onclick = () => copied(csvOf(this), "numbers");
    element("link").onclick = () => copied(location.href.split("#")[0] + addressOf(this.state, this.header), "link");
    element("png").onclick = () => savedPicture(this).toBlob((blob) => saved(blob, "attention.png"));
    element("svg").onclick = () => saved(new Blob([savedDrawing(this)], { type: "image/svg+xml" }), "attention.svg");
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

  /** Make the next patch of the layer that is shown the query, or of a list the next query. */
  move(down, across) {
    const { layout } = this.map, { query, item } = this.state, { prefix } = this.layout, { image } = this.header;
    const token = layout.are_queries_patches ? tokenIn(layout, query, this.layout) : null;
    if (!layout.are_queries_patches) this.show({ item: Math.min(Math.max(item + (down || across), 0), layout.windows * layout.rows - 1) });
    else if (token === null || token < layout.prefix) this.show({ query: prefix });
    else {
      const columns = layout.grid[1], row = Math.floor((token - layout.prefix) / columns) + down, column = ((token - layout.prefix) % columns) + across;
      if (row < 0 || row >= layout.grid[0] || column < 0 || column >= columns) return;
      const [y, x] = [row, column].map((line, axis) => (layout.offset[axis] + (line + 0.5) * layout.patch[axis]) / image[axis]);
      this.show({ query: tokenAt(Math.min(x, 1 - 1e-6), Math.min(y, 1 - 1e-6), this.layout, image) ?? query });
    }
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
      element("spoken").textContent = `${captionOf(this)}. ${numbers.join(", ")}`;
    }, 400);
  }

  // --- drawn at each change ---

  draw() {
    const { state, header } = this, group = header.groups[state.group], moment = group.moments[state.moment];
    const shown = { ...state, direction: this.shiftedDirection };
    for (const thumbnail of this.thumbnails) drawThumbnail(this, thumbnail, shown);
    this.headings.forEach((heading, at) => heading.classList.toggle("unknown", !this.isKnown(this.order[at]) && this.order[at] !== state.head));
    this.map = this.mapOf(shown, state.layer, state.head);
    this.largest = largestOf(this.map);
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
      button.tabIndex = isShown ? 0 : -1;
    }
    const notes = state.unknown.map((each) => `The address asks for ${each}, which is not here.`);
    if (state.filter !== "all" && !passing) notes.push("No image passes the filter at this moment.");
    element("notice").textContent = notes.join(" ");
    element("own-scales").hidden = state.colors === "relative";
    this.tokens.forEach((button, token) => {
      const { layout, weights } = this.map, value = token < (layout.prefix ?? 0) && weights ? weights[token] : null;
      button.firstChild.style.background = value === null ? "" : this.color(value, this.map.times(token - layout.prefix));
      button.lastChild.textContent = value === null ? "–" : percent(value);
      button.setAttribute("aria-pressed", token === state.query);
      button.classList.toggle("pinned", this.state.pinned && token === state.query);
    });
    drawComparison(this, shown);
    element("caption").textContent = captionOf(this);
    this.drawList();
    this.drawMap(element("map"));
    drawScale(this);
    element("numbers").replaceChildren(...numbersOf(this).map(([name, text]) => made("div", {}, made("dt", {}, name), made("dd", {}, text))));
    element("time").hidden = group.moments.length < 2;
    if (group.moments.length > 1) drawChart(this, group, moment);
    for (const name of ["direction", "colors", "opacity", "filter"]) element(name).value = state[name];
    element("smooth").checked = state.smooth;
    this.address = addressOf(state, header);
    clearTimeout(this.addressTimer); // browsers allow few changes of the address in a second
    this.addressTimer = setTimeout(() => location.protocol !== "about:" && history.replaceState(null, "", this.address), 150);
  }

  /** Return a column of a layer as it is drawn: its weights by token (null: it has no such query), and the cells of its map,
   * or of the whole matrix where its places are not known. */
  mapOf(view, layer, head) {
    const layout = this.attention.layouts[layer], weights = this.attention.of(view, layer, head);
    if (!layout.grid) return { layout, weights, grid: [layout.windows * layout.rows, layout.keys], times: () => layout.all_keys,
      values: this.attention.matrix(view, layer, head) };
    const times = timesUniform(layout, tokenIn(layout, view.query, this.layout), view.direction === "row");
    return { layout, weights, grid: layout.grid, values: weights && weights.subarray(layout.prefix), times: (cell) => times(cell + layout.prefix) };
  }

  /** Say what is peculiar of the layer that is shown, and list its queries where they are no patches. */
  drawList() {
    const { layout } = this.map, isList = !layout.are_queries_patches;
    element("about-layer").textContent = aboutLayer(this);
    element("items").hidden = !isList;
    if (!isList) return;
    element("item").max = layout.windows * layout.rows;
    element("item").value = this.state.item + 1;
    element("item").setAttribute("aria-valuetext", nameOfQuery(this));
    element("item-name").textContent = nameOfQuery(this);
  }

  /** Return the place of a weight in the colour table, 0 to 255: of `times` it, relative to uniform, or as a share of the
   * largest. */
  place(value, times, largest = this.largest) {
    const share = this.state.colors === "relative" ? onRelativeScale(value, times, this.header.doublings) : value / (largest || 1);
    return Math.round(255 * Math.min(1, share));
  }

  color(value, times) {
    const table = this.tables[this.state.colors], at = 3 * this.place(value, times);
    return `rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})`;
  }

  drawMap(canvas) {
    const { state, map } = this, [height, width] = this.header.image;
    const side = canvas.parentElement.clientWidth, ratio = devicePixelRatio || 1;
    const shown = Math.round(Math.min(side, 460) * ratio);
    if (canvas.width !== shown) {
      canvas.width = shown;
      canvas.height = Math.round((shown * height) / width);
    }
    canvas.style.width = `${shown / ratio}px`;
    canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    drawOverlay(this, canvas.getContext("2d"), canvas.width, canvas.height, map, state, this.largest);
    const what = map.layout.grid ? `Map of ${map.grid[0]} by ${map.grid[1]} ${map.layout.has_cells ? "cells" : "patches"}` : `Matrix of ${map.grid[0]} queries by ${map.grid[1]} keys`;
    canvas.setAttribute("aria-label", `${what}. ${captionOf(this)}`);
  }
}
