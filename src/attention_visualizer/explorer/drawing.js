// What is drawn: maps over images, the comparison, the chart over training.

/** Draw the kept view, the one that is shown, and what lies between them; the query is the same. */
function drawComparison(page, shown) {
  const { state, map } = page, { kept } = state;
  element("comparison").hidden = kept === null;
  if (kept === null) return;
  const view = { ...shown, ...kept }, before = page.mapOf(view, kept.layer, kept.head);
  const largest = Math.max(largestOf(before), largestOf(map)); // one scale for both
  for (const [id, each, of] of [["kept", before, view], ["now", map, shown]]) {
    drawInto(page, element(id), (context, width, height) => drawOverlay(page, context, width, height, each, of, largest));
    element(`${id}-caption`).textContent = differing(page, of, id === "kept" ? shown : view);
  }
  const isSame = before.layout === map.layout && before.values !== null && map.values !== null, texts = [];
  element("difference").hidden = !isSame;
  if (isSame) texts.push(...drawDifference(page, shown, view, before, map));
  else element("difference-caption").textContent = "none: the two layers attend to other tokens, or have no such query";
  element("distance").textContent = texts.join(" ");
}

/** Draw the difference of two maps of the same tokens; return what it comes to, in sentences. */
function drawDifference(page, shown, view, before, map) {
  const { header } = page, isRelative = page.state.colors === "relative", { doublings } = header;
  const changes = map.values.map((value, cell) => isRelative
    ? doublingsBetween(before.values[cell], value, map.times(cell), doublings) : value - before.values[cell]);
  const limit = isRelative ? doublings : changes.reduce((most, each) => Math.max(most, Math.abs(each) || 0), 1e-6);
  const place = (value) => Math.round(255 * Math.min(1, Math.max(0, (value / limit + 1) / 2)));
  drawInto(page, element("difference"), (context, width, height) => {
    context.clearRect(0, 0, width, height);
    drawCells(page, context, width, height, { ...map, values: changes }, page.tables.difference, place);
  });
  const most = 2 ** doublings;
  element("difference-caption").textContent = isRelative
    ? `now / kept: purple ≤ 1/${most}×, white 1×, orange ≥ ${most}×; less than 1/${most} of uniform counts as that`
    : `now − kept: purple −${(100 * limit).toFixed(1)} points, white 0, orange +${(100 * limit).toFixed(1)}; both maps on one scale`;
  const texts = [], { prefix = 0 } = map.layout;
  if (page.direction === "row") {
    const entropies = [[view, before], [shown, map]].map(([of, { weights }]) => page.attention.entropyOfView(of, weights));
    if (!entropies.some(Number.isNaN)) texts.push(`Entropy ${entropies.map((each) => each.toFixed(2)).join(" → ")} nats;`);
    texts.push(`${percent(totalVariation(before.weights, map.weights))} of the attention lies elsewhere (total variation).`);
  }
  for (let token = 0; token < prefix; token++)
    texts.push(`${nameOfToken(token, map.layout)} ${percent(before.weights[token])} → ${percent(map.weights[token])}.`);
  return texts;
}

/** Say in which ways a view differs from another; all of it where they are the same. */
function differing(page, view, other) {
  const of = namesOf(page.header, view), differs = (...names) => names.some((name) => view[name] !== other[name]);
  const parts = [[differs("group", "picture"), of.picture], [differs("layer", "head"), nameOfMap(view.layer, view.head, page.header)],
    [differs("group", "moment"), of.moment]];
  const those = parts.filter(([isOther]) => isOther);
  return (those.length ? those : parts).map(([, text]) => text).join(" · ");
}

function drawInto(page, canvas, draw) {
  const [height, width] = page.header.image, ratio = devicePixelRatio || 1;
  const side = Math.round(Math.min(canvas.parentElement.clientWidth, 220) * ratio);
  canvas.width = side;
  canvas.height = Math.round((side * height) / width);
  canvas.style.width = `${side / ratio}px`;
  draw(canvas.getContext("2d"), canvas.width, canvas.height);
}

/** Return where the chart's lines lie on a canvas of so many pixels. */
function chartFrame(width) {
  return { left: 34, top: 8, width: width - 34 - 84, height: 108 };
}

function drawChart(page, group, moment) {
  const { state, header } = page, heads = headsOf(header), view = { ...state }, slider = element("moment"), last = group.moments.length - 1;
  slider.max = last;
  slider.value = state.moment;
  slider.setAttribute("aria-valuetext", moment.title);
  element("when").textContent = moment.title;
  const chart = element("chart"), width = chart.parentElement.clientWidth, ratio = devicePixelRatio || 1;
  chart.width = width * ratio;
  chart.height = 140 * ratio;
  const context = chart.getContext("2d"), frame = chartFrame(width), style = getComputedStyle(document.body);
  context.scale(ratio, ratio);
  context.font = `12px ${style.fontFamily}`;
  const x = (index) => frame.left + (frame.width * index) / last, highest = Math.log(Math.max(...header.layouts.map((layout) => layout.all_keys)));
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
  const at = (index, layer, head) => page.attention.entropy({ ...view, moment: index }, layer, head);
  const every = Array.from({ length: last + 1 }, (_, index) => index);
  header.layers.forEach(({ heads: count }, layer) => {
    const others = layer === state.layer ? Array.from({ length: count }, (_, head) => head) : [];
    for (const head of others) if (head !== state.head) line(every.map((index) => at(index, layer, head)), faint, 1);
    const mean = every.map((index) => {
      let sum = 0;
      for (let head = 0; head < count; head++) sum += at(index, layer, head) / count;
      return sum;
    });
    if (layer !== state.layer) line(mean, faint, 1, [1, 3]);
    else if (state.head >= heads) line(mean, accent, 2.5);
  });
  if (state.head < heads) line(every.map((index) => at(index, state.layer, state.head)), accent, 2.5);
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
  const { number } = header.layers[state.layer];
  const of = state.head < heads ? `thick: head ${number}.${state.head + 1}, thin: other heads of layer ${number}`
    : `thin: the heads of layer ${number}, thick: the mean of their entropies, which is less than the entropy of their mean map`;
  element("legend").textContent = `Entropy in nats of the attention from ${nameOfQuery(page)} on this image, by step (moments evenly spaced); ${of}; dotted: other layers.`;
  chart.setAttribute("aria-label", element("legend").textContent);
}

/** Return the names of a view's picture and moment. */
function namesOf({ groups }, { group, picture, moment }) {
  return { picture: groups[group].pictures[picture].name, moment: groups[group].moments[moment].title };
}

/** Draw a map over a view's image, and the query; of a layer without places, its matrix. largest: the weight at the end of
 * a scale of shares. */
function drawOverlay(page, context, width, height, map, view, largest) {
  const { state } = page, image = page.images[view.group][view.picture], { layout } = map;
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = image.naturalWidth > 100;
  if (layout.grid) context.drawImage(image, 0, 0, width, height);
  if (map.values === null) return;
  context.globalAlpha = layout.grid ? state.opacity / 100 : 1;
  drawCells(page, context, width, height, map, page.tables[state.colors], (value, cell) => page.place(value, map.times(cell), largest));
  context.globalAlpha = 1;
  const box = boxOfQuery(page, map, width, height), line = Math.max(2, width / 160);
  if (box === null) return;
  for (const [color, thick] of [["#000", 2 * line], [page.state.pinned ? "#ffd60a" : "#fff", line]]) {
    const by = Math.min(line, box[2] / 2, box[3] / 2); // inside, where there is room
    context.strokeStyle = color;
    context.lineWidth = thick;
    context.strokeRect(box[0] + by, box[1] + by, box[2] - 2 * by, box[3] - 2 * by);
  }
}

/** Return where the query lies on a drawn map: left, top, width, height; null where it is no cell of it. */
function boxOfQuery(page, { layout, grid }, width, height) {
  const [left, top, across, down] = cellsOn(page, layout, grid, width, height), { query, item } = page.state;
  if (!layout.grid) return [left, top + Math.min(item, grid[0] - 1) * down, width, down];
  const own = layout.are_queries_patches ? tokenIn(layout, query, page.layout) : null;
  const token = page.direction === "row" ? standIn(layout, own) : own;
  if (token === null || token < layout.prefix) return null;
  const cell = token - layout.prefix;
  return [left + (cell % grid[1]) * across, top + Math.floor(cell / grid[1]) * down, across, down];
}

/** Return where cells lie on a drawn image: left, top, width and height of the first. A matrix takes all of it. */
function cellsOn(page, layout, grid, width, height) {
  if (!layout.grid) return [0, 0, width / grid[1], height / grid[0]];
  const across = width / page.header.image[1], down = height / page.header.image[0];
  return [layout.offset[1] * across, layout.offset[0] * down, layout.patch[1] * across, layout.patch[0] * down];
}

/** Draw each cell in the colour at `place` of its value, 0 to 255, in a table. */
function drawCells(page, context, width, height, map, table, place) {
  const { grid, layout, values } = map, canvas = gridCanvas(page, grid);
  const pixels = canvas.getContext("2d").createImageData(grid[1], grid[0]);
  paint(values, pixels.data, table, place);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const [left, top, across, down] = cellsOn(page, layout, grid, width, height);
  context.imageSmoothingEnabled = page.state.smooth && layout.grid !== undefined;
  context.drawImage(canvas, left, top, across * grid[1], down * grid[0]);
}

/** Return a canvas with a pixel for each cell, which is used again. */
function gridCanvas(page, grid) {
  return Object.assign(page.grid, { width: grid[1], height: grid[0] });
}

/** Return the part of a map that lies in the query's window, as far as it goes; a map without windows as it is. */
function withinWindow(map) {
  const { grid: [height, width], values } = map;
  if (!map.layout.key_of_patch || values === null) return map;
  let [top, left, bottom, right] = [height, width, 0, 0];
  values.forEach((value, cell) => {
    if (Number.isNaN(value)) return;
    [top, bottom] = [Math.min(top, Math.floor(cell / width)), Math.max(bottom, Math.floor(cell / width) + 1)];
    [left, right] = [Math.min(left, cell % width), Math.max(right, (cell % width) + 1)];
  });
  if (bottom === 0) return map;
  const rows = Array.from({ length: bottom - top }, (_, row) => [...values.subarray((top + row) * width + left, (top + row) * width + right)]);
  return { ...map, grid: [bottom - top, right - left], values: Float32Array.from(rows.flat()) };
}

/** Draw a layer's column as it is in the table, and say of its button whether it is the one that is shown. */
function drawThumbnail(page, thumbnail, shown) {
  const { layer, head, button, context } = thumbnail, isShown = layer === shown.layer && head === shown.head;
  button.setAttribute("aria-pressed", isShown);
  button.tabIndex = isShown ? 0 : -1;
  button.classList.toggle("unknown", !isShown && !page.isKnown(head));
  const { group, moment, picture, colors } = shown, drawn = [group, moment, picture, colors].join();
  if (!page.attention.layouts[layer].grid && thumbnail.drawn === drawn) return; // a matrix is the same for each query
  thumbnail.drawn = drawn;
  const map = withinWindow(page.mapOf(shown, layer, head)), [height, width] = map.grid, { canvas } = context, largest = largestOf(map);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pixels = context.createImageData(width, height);
  if (map.values) paint(map.values, pixels.data, page.tables[shown.colors], (value, cell) => page.place(value, map.times(cell), largest));
  context.putImageData(pixels, 0, 0);
}

/** Return the largest weight that a map shows. */
function largestOf({ values }) {
  let largest = 0;
  for (const value of values ?? []) if (value > largest) largest = value;
  return largest;
}

/** Write the colours of cells into RGBA pixels; what is not a number, outside of a window, is left bare. */
function paint(values, pixels, table, place) {
  for (let cell = 0; cell < values.length; cell++) {
    const at = 4 * cell, isBare = Number.isNaN(values[cell]), from = isBare ? 0 : 3 * place(values[cell], cell);
    pixels[at] = table[from];
    pixels[at + 1] = table[from + 1];
    pixels[at + 2] = table[from + 2];
    pixels[at + 3] = isBare ? 0 : 255;
  }
}

function drawScale(page) {
  const { state, header } = page, table = page.tables[state.colors], context = element("bar").getContext("2d");
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
  element("ticks").title = state.colors === "relative" ? `times uniform attention, 1/${page.map.layout.all_keys}` : "share of the attention";
}
