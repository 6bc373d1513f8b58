// What is drawn: maps over images, the comparison, the chart over training, the picture that is saved.

/** Draw the kept view, the one that is shown, and what lies between them; the query is the same. */
function drawComparison(page, shown) {
  const { state, layout, header } = page, { kept } = state;
  element("comparison").hidden = kept === null;
  if (kept === null) return;
  const before = page.attention.of({ ...shown, ...kept }, kept.layer, kept.head), isRelative = state.colors === "relative";
  const sides = [["kept", before, kept], ["now", page.values, state]];
  for (const [id, values, view] of sides) {
    drawInto(page, element(id), (context, width, height) => drawOverlay(page, context, width, height, values, view));
    element(`${id}-caption`).textContent = differing(page, view, id === "kept" ? state : kept);
  }
  const changes = page.values.map((value, token) => isRelative
    ? doublingsBetween(before[token], value, layout.tokens, header.doublings) : value - before[token]);
  const limit = isRelative ? header.doublings : changes.reduce((one, other) => Math.max(one, Math.abs(other)), 1e-6);
  const place = (value) => Math.round(255 * Math.min(1, Math.max(0, (value / limit + 1) / 2)));
  drawInto(page, element("difference"), (context, width, height) => {
    context.clearRect(0, 0, width, height);
    drawPatches(page, context, width, height, changes, page.tables.difference, place);
  });
  const ends = isRelative ? [`1/${2 ** limit}×`, "1×", `${2 ** limit}×`] : [-limit, 0, limit].map((value) => `${(100 * value).toFixed(1)} points`);
  element("difference-caption").textContent = `now / kept: purple ${ends[0]}, white ${ends[1]}, orange ${ends[2]}`
    + (isRelative ? `; less than 1/${2 ** limit} of uniform counts as that` : "");
  if (!isRelative) element("difference-caption").textContent = `now − kept: purple ${ends[0]}, white 0, orange ${ends[2]}`;
  element("distance").textContent = page.direction === "row"
    ? `Entropy ${entropyOf(before).toFixed(2)} → ${entropyOf(page.values).toFixed(2)} nats; ${percent(totalVariation(before, page.values))} of the attention lies elsewhere (total variation).` : "";
}

/** Say in which ways a view differs from another; all of it where they are the same. */
function differing(page, view, other) {
  const of = namesOf(page.header, view), differs = (...names) => names.some((name) => view[name] !== other[name]);
  const parts = [[differs("group", "picture"), of.picture], [differs("layer", "head"), page.nameOfMap(view.layer, view.head)],
    [differs("group", "moment"), of.moment]];
  const those = parts.filter(([isOther]) => isOther);
  return (those.length ? those : parts).map(([, text]) => text).join(" · ");
}

function drawInto(page, canvas, draw) {
  const [height, width] = page.layout.image, ratio = devicePixelRatio || 1;
  const side = Math.round(Math.min(canvas.parentElement.clientWidth, 220) * ratio);
  canvas.width = side;
  canvas.height = Math.round((side * height) / width);
  canvas.style.width = `${side / ratio}px`;
  draw(canvas.getContext("2d"), canvas.width, canvas.height);
}

function drawChart(page, group, moment) {
  const { state, layout } = page, slider = element("moment"), last = group.moments.length - 1;
  slider.max = last;
  slider.value = state.moment;
  slider.setAttribute("aria-valuetext", moment.title);
  element("when").textContent = moment.title;
  const chart = element("chart"), width = chart.parentElement.clientWidth, ratio = devicePixelRatio || 1;
  chart.width = width * ratio;
  chart.height = 140 * ratio;
  const context = chart.getContext("2d"), frame = page.frame(width), style = getComputedStyle(document.body);
  context.scale(ratio, ratio);
  context.font = `12px ${style.fontFamily}`;
  const x = (index) => frame.left + (frame.width * index) / last, highest = Math.log(layout.tokens);
  const y = (entropy) => frame.top + frame.height * (1 - entropy / highest);
  const line = (values, color, thick, dash = []) => {
    context.strokeStyle = color;
    context.lineWidth = thick;
    context.setLineDash(dash);
    context.beginPath();
    values.forEach((value, index) => context[index ? "lineTo" : "moveTo"](x(index), y(value)));
    context.stroke();
    context.setLineDash([]);
  };
  const faint = style.getPropertyValue("--faint"), text = style.getPropertyValue("--text"), accent = style.getPropertyValue("--accent");
  context.fillStyle = text;
  context.textBaseline = "middle";
  for (let value = 0; value <= highest; value++) {
    context.textAlign = "right";
    context.fillText(String(value), frame.left - 6, y(value));
    line(Array(last + 1).fill(value), style.getPropertyValue("--line"), 1);
  }
  line(Array(last + 1).fill(highest), faint, 1, [4, 4]);
  context.textAlign = "left";
  context.fillText("uniform", frame.left + frame.width + 6, y(highest));
  const at = (index, layer, head) => page.attention.entropy(state.group, index, state.picture, layer, head, state.query);
  const every = Array.from({ length: last + 1 }, (_, index) => index);
  for (let layer = 0; layer < layout.layers; layer++) {
    const heads = layer === state.layer ? Array.from({ length: layout.heads }, (_, head) => head) : [];
    for (const head of heads) if (head !== state.head) line(every.map((index) => at(index, layer, head)), faint, 1);
    const mean = every.map((index) => {
      let sum = 0;
      for (let head = 0; head < layout.heads; head++) sum += at(index, layer, head) / layout.heads;
      return sum;
    });
    if (layer !== state.layer) line(mean, faint, 1, [1, 3]);
    else if (state.head >= layout.heads) line(mean, accent, 2.5);
  }
  if (state.head < layout.heads) line(every.map((index) => at(index, state.layer, state.head)), accent, 2.5);
  context.fillStyle = accent;
  context.fillRect(x(state.moment) - 1, frame.top, 2, frame.height);
  context.fillStyle = text;
  context.textBaseline = "top";
  const room = Math.max(1, Math.ceil((last + 1) / Math.max(2, Math.floor(frame.width / 64))));
  group.moments.forEach((each, index) => {
    if (each.step === null || (index % room && index !== last) || (index !== last && last - index < room)) return;
    context.textAlign = index === last ? "right" : index ? "center" : "left";
    context.fillText(each.step.toLocaleString("en"), x(index), frame.top + frame.height + 6);
  });
  const of = state.head < layout.heads ? `thick: head ${state.layer + 1}.${state.head + 1}, thin: other heads of layer ${state.layer + 1}`
    : `thick: layer ${state.layer + 1}, mean over heads, thin: its heads`;
  element("legend").textContent = `Entropy in nats of the ${page.nameOfToken(state.query)}'s attention on this image, by step (moments evenly spaced); ${of}; dotted: other layers.`;
  chart.setAttribute("aria-label", element("legend").textContent);
}

/** Draw the map with its caption into a picture. */
function savedPicture(page) {
  const [height, width] = page.layout.image, side = 720, canvas = document.createElement("canvas");
  const context = canvas.getContext("2d"), font = (size) => `${size}px ${getComputedStyle(document.body).fontFamily}`;
  const map = Math.round((side * height) / width);
  const facts = page.header.facts.map(([label, text]) => `${label} ${text}`).join(" · ");
  const texts = [...page.caption().split(" · "), facts, ...page.header.warnings.map((text) => `Warning. ${text}`)];
  context.font = font(18);
  const lines = texts.flatMap((text) => wrapped(text, (part) => context.measureText(part).width <= side));
  Object.assign(canvas, { width: side + 40, height: map + 90 + 26 * lines.length });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.translate(20, 20);
  drawOverlay(page, context, side, map);
  context.imageSmoothingEnabled = true;
  context.drawImage(element("bar"), 0, map + 12, side, 12);
  context.fillStyle = "#000";
  context.font = font(14);
  const ticks = [...element("ticks").children];
  ticks.forEach((tick, index) => {
    context.textAlign = index === 0 ? "left" : index === ticks.length - 1 ? "right" : "center";
    context.fillText(tick.textContent, (side * index) / (ticks.length - 1), map + 40);
  });
  context.textAlign = "left";
  context.font = font(18);
  lines.forEach((text, index) => context.fillText(text, 0, map + 70 + 26 * index));
  return canvas;
}

/** Return the names of a view's picture and moment. */
function namesOf({ groups }, { group, picture, moment }) {
  return { picture: groups[group].pictures[picture].name, moment: groups[group].moments[moment].title };
}

/** Cut a text into lines, at spaces, that `fits` says to be short enough. */
function wrapped(text, fits) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
    if (fits(longer) || !lines.at(-1)) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

/** Draw values over a view's image, and the query. */
function drawOverlay(page, context, width, height, values = page.values, view = page.state) {
  const { state, layout } = page, image = page.images[view.group][view.picture];
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = image.naturalWidth > 100;
  context.drawImage(image, 0, 0, width, height);
  page.largest = largestOf(page, values);
  context.globalAlpha = state.opacity / 100;
  context.imageSmoothingEnabled = state.smooth;
  drawPatches(page, context, width, height, values, page.tables[state.colors], (value) => page.place(value));
  context.globalAlpha = 1;
  if (state.query < layout.prefix) return;
  const number = state.query - layout.prefix, line = Math.max(2, width / 160);
  const [left, top, patchWidth, patchHeight] = patches(page, width, height);
  const x = left + (number % layout.grid[1]) * patchWidth, y = top + Math.floor(number / layout.grid[1]) * patchHeight;
  for (const [color, thick] of [["#000", 2 * line], [page.state.pinned ? "#ffd60a" : "#fff", line]]) {
    context.strokeStyle = color;
    context.lineWidth = thick;
    context.strokeRect(x + line, y + line, patchWidth - 2 * line, patchHeight - 2 * line);
  }
}

/** Return where patches lie on a drawn image: left, top, width and height of the first. */
function patches(page, width, height) {
  const { layout } = page, across = width / layout.image[1], down = height / layout.image[0];
  return [layout.offset[1] * across, layout.offset[0] * down, layout.patch[1] * across, layout.patch[0] * down];
}

/** Draw each patch in the colour at `place` of its value, 0 to 255, in a table. */
function drawPatches(page, context, width, height, values, table, place) {
  const { layout } = page, grid = page.grid.getContext("2d"), pixels = grid.createImageData(layout.grid[1], layout.grid[0]);
  paint(page, values, pixels.data, table, place);
  grid.putImageData(pixels, 0, 0);
  const [left, top, patchWidth, patchHeight] = patches(page, width, height);
  const isSmoothed = context.imageSmoothingEnabled && page.state.smooth;
  context.imageSmoothingEnabled = isSmoothed;
  context.drawImage(page.grid, left, top, patchWidth * layout.grid[1], patchHeight * layout.grid[0]);
}

function largestOf(page, values) {
  let largest = 0;
  for (let token = page.layout.prefix; token < page.layout.tokens; token++) largest = Math.max(largest, values[token]);
  return largest;
}

/** Write the colours of patches into RGBA pixels. */
function paint(page, values, pixels, table, place) {
  const { prefix, tokens } = page.layout;
  for (let token = prefix; token < tokens; token++) {
    const at = 4 * (token - prefix), from = 3 * place(values[token]);
    pixels[at] = table[from];
    pixels[at + 1] = table[from + 1];
    pixels[at + 2] = table[from + 2];
    pixels[at + 3] = 255;
  }
}

function drawScale(page) {
  const { state, layout, header } = page, table = page.tables[state.colors], context = element("bar").getContext("2d");
  const pixels = context.createImageData(256, 1);
  for (let place = 0; place < 256; place++) pixels.data.set([table[3 * place], table[3 * place + 1], table[3 * place + 2], 255], 4 * place);
  context.putImageData(pixels, 0, 0);
  const labels = state.colors === "relative"
    ? Array.from({ length: 2 * header.doublings + 1 }, (_, index) => {
      const power = index - header.doublings, ends = { [-header.doublings]: "≤ ", [header.doublings]: "≥ " };
      return `${ends[power] ?? ""}${power < 0 ? `1/${2 ** -power}` : 2 ** power}×`;
    })
    : [0, 0.25, 0.5, 0.75, 1].map((share) => percent(share * page.largest));
  element("ticks").replaceChildren(...labels.map((text) => made("span", {}, text)));
  element("ticks").title = state.colors === "relative" ? `times uniform attention, 1/${layout.tokens}` : "share of the attention";
}
