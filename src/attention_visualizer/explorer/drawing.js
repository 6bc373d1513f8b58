// What is drawn: maps over images, the comparison, the chart over training, the picture that is saved.

const SAVED_SIDE = 720, FONT = "system-ui, sans-serif"; // pixels; of saved pictures

/** Draw the kept view, the one that is shown, and what lies between them; the query is the same. */
function drawComparison(page, shown) {
  const { state, layout, header } = page, { kept } = state;
  element("comparison").hidden = kept === null;
  if (kept === null) return;
  const before = page.attention.of({ ...shown, ...kept }, kept.layer, kept.head), isRelative = state.colors === "relative";
  const largest = Math.max(largestOf(page, before), largestOf(page, page.values)); // one scale for both
  for (const [id, values, view] of [["kept", before, kept], ["now", page.values, state]]) {
    drawInto(page, element(id), (context, width, height) => drawOverlay(page, context, width, height, values, view, largest));
    element(`${id}-caption`).textContent = differing(page, view, id === "kept" ? state : kept);
  }
  const changes = page.values.map((value, token) => isRelative
    ? doublingsBetween(before[token], value, layout.tokens, header.doublings) : value - before[token]);
  const limit = isRelative ? header.doublings : changes.slice(layout.prefix).reduce((one, other) => Math.max(one, Math.abs(other)), 1e-6);
  const place = (value) => Math.round(255 * Math.min(1, Math.max(0, (value / limit + 1) / 2)));
  drawInto(page, element("difference"), (context, width, height) => {
    context.clearRect(0, 0, width, height);
    drawPatches(page, context, width, height, changes, page.tables.difference, place);
  });
  const most = 2 ** header.doublings;
  element("difference-caption").textContent = isRelative
    ? `now / kept: purple ≤ 1/${most}×, white 1×, orange ≥ ${most}×; less than 1/${most} of uniform counts as that`
    : `now − kept: purple −${(100 * limit).toFixed(1)} points, white 0, orange +${(100 * limit).toFixed(1)}; both maps on one scale`;
  const texts = [];
  if (page.direction === "row") {
    const entropies = [[kept, before], [state, page.values]].map(([view, values]) => page.attention.entropyOfView(view, state.query, values));
    texts.push(`Entropy ${entropies.map((each) => each.toFixed(2)).join(" → ")} nats; ${percent(totalVariation(before, page.values))} of the attention lies elsewhere (total variation).`);
  }
  for (let token = 0; token < layout.prefix; token++)
    texts.push(`${nameOfToken(token, page.layout)} ${percent(before[token])} → ${percent(page.values[token])}.`);
  element("distance").textContent = texts.join(" ");
}

/** Say in which ways a view differs from another; all of it where they are the same. */
function differing(page, view, other) {
  const of = namesOf(page.header, view), differs = (...names) => names.some((name) => view[name] !== other[name]);
  const parts = [[differs("group", "picture"), of.picture], [differs("layer", "head"), nameOfMap(view.layer, view.head, page.layout)],
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

/** Return where the chart's lines lie on a canvas of so many pixels. */
function chartFrame(width) {
  return { left: 34, top: 8, width: width - 34 - 84, height: 108 };
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
  const context = chart.getContext("2d"), frame = chartFrame(width), style = getComputedStyle(document.body);
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
    : `thin: the heads of layer ${state.layer + 1}, thick: the mean of their entropies, which is less than the entropy of their mean map`;
  element("legend").textContent = `Entropy in nats of the ${nameOfToken(state.query, page.layout)}'s attention on this image, by step (moments evenly spaced); ${of}; dotted: other layers.`;
  chart.setAttribute("aria-label", element("legend").textContent);
}

/** Return what stands below a saved map, in lines that `fits` says to be short enough. */
function captionLines(page, fits) {
  const facts = page.header.facts.map(([label, text]) => `${label} ${text}`).join(" · ");
  const texts = [...page.caption().split(" · "), facts, ...page.header.warnings.map((text) => `Warning. ${text}`)];
  return texts.flatMap((text) => wrapped(text, fits));
}

/** Draw the map with its scale and caption into a picture. */
function savedPicture(page) {
  const [height, width] = page.layout.image, side = SAVED_SIDE, canvas = document.createElement("canvas");
  const context = canvas.getContext("2d"), font = (size) => `${size}px ${FONT}`;
  const map = Math.round((side * height) / width);
  context.font = font(18);
  const lines = captionLines(page, (part) => context.measureText(part).width <= side);
  Object.assign(canvas, { width: side + 40, height: map + 90 + 26 * lines.length });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.translate(20, 20);
  drawOverlay(page, context, side, map, page.values, page.state, page.largest);
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

/** Return the same as SVG: patches are rectangles, and text is text. */
function savedDrawing(page) {
  drawOverlay(page, document.createElement("canvas").getContext("2d"), 1, 1, page.values, page.state, page.largest); // for page.grid
  const { state, layout, header } = page, side = SAVED_SIDE, map = Math.round((side * layout.image[0]) / layout.image[1]);
  const lines = captionLines(page, (part) => part.length <= 76), table = page.tables[state.colors];
  const [left, top, width, height] = patches(page, side, map);
  const box = (patch, rest) => `<rect x="${left + (patch % layout.grid[1]) * width}" y="${top + Math.floor(patch / layout.grid[1]) * height}" width="${width}" height="${height}" ${rest}/>`;
  const picture = header.groups[state.group].pictures[state.picture].png;
  const parts = [`<image href="${picture}" width="${side}" height="${map}" preserveAspectRatio="none"${page.images[state.group][state.picture].naturalWidth > 100 ? "" : ' style="image-rendering:pixelated"'}/>`];
  for (let patch = 0; patch < layout.tokens - layout.prefix; patch++)
    if (!state.smooth) parts.push(box(patch, `fill="${page.color(page.values[layout.prefix + patch])}" fill-opacity="${state.opacity / 100}"`));
  if (state.smooth) parts.push(`<image href="${page.grid.toDataURL()}" x="${left}" y="${top}" width="${width * layout.grid[1]}" height="${height * layout.grid[0]}" opacity="${state.opacity / 100}" preserveAspectRatio="none"/>`);
  const marks = state.query < layout.prefix ? [] : [["#000", 8], [state.pinned ? "#ffd60a" : "#fff", 4]];
  for (const [color, thick] of marks) parts.push(box(state.query - layout.prefix, `fill="none" stroke="${color}" stroke-width="${thick}"`));
  const stops = Array.from({ length: 17 }, (_, index) => {
    const at = 3 * Math.min(255, 16 * index);
    return `<stop offset="${index / 16}" stop-color="rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})"/>`;
  });
  parts.push(`<linearGradient id="scale">${stops.join("")}</linearGradient><rect y="${map + 12}" width="${side}" height="12" fill="url(#scale)"/>`);
  const ticks = [...element("ticks").children];
  ticks.forEach((tick, index) => parts.push(`<text x="${(side * index) / (ticks.length - 1)}" y="${map + 42}" font-size="14" text-anchor="${index === 0 ? "start" : index === ticks.length - 1 ? "end" : "middle"}">${escaped(tick.textContent)}</text>`));
  lines.forEach((text, index) => parts.push(`<text y="${map + 72 + 26 * index}" font-size="18">${escaped(text)}</text>`));
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -20 ${side + 40} ${map + 100 + 26 * lines.length}" font-family="${FONT}"><rect x="-20" y="-20" width="100%" height="100%" fill="#fff"/>${parts.join("\n")}</svg>\n`;
}

/** Return text as it stands in XML: no markup of its own. */
function escaped(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "");
}

/** Return the numbers of the map, with what it is of. */
function csvOf(page) {
  const { layout, values, header } = page, about = [header.title, page.caption(), ...header.facts.map((each) => each.join(" ")),
    ...header.warnings.map((text) => `Warning. ${text}`)];
  const lines = [...about.map((text) => `# ${text.replace(/[\r\n]+/g, " ")}`), "token,row,column,weight"];
  values.forEach((value, token) => {
    const patch = token - layout.prefix, isPatch = patch >= 0;
    lines.push([token + 1, isPatch ? Math.floor(patch / layout.grid[1]) + 1 : "", isPatch ? (patch % layout.grid[1]) + 1 : "", value.toPrecision(4)].join(","));
  });
  return lines.join("\n") + "\n";
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

/** Draw values over a view's image, and the query. largest: the value at the end of a scale of shares. */
function drawOverlay(page, context, width, height, values, view, largest) {
  const { state, layout } = page, image = page.images[view.group][view.picture];
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = image.naturalWidth > 100;
  context.drawImage(image, 0, 0, width, height);
  context.globalAlpha = state.opacity / 100;
  context.imageSmoothingEnabled = state.smooth;
  drawPatches(page, context, width, height, values, page.tables[state.colors], (value) => page.place(value, largest));
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
