// What is taken along: the view as a picture or a drawing with its caption, the numbers as CSV.

const SAVED_SIDE = 720, FONT = "system-ui, sans-serif"; // pixels

/** Return what stands below a saved map, in lines that `fits` says to be short enough. */
function captionLines(page, fits) {
  const facts = page.header.facts.map(([label, text]) => `${label} ${text}`).join(" · ");
  const texts = [...captionOf(page).split(" · "), facts, ...page.header.warnings.map((text) => `Warning. ${text}`)];
  return texts.flatMap((text) => wrapped(text, fits));
}

/** Draw the map with its scale and caption into a picture. */
function savedPicture(page) {
  const [height, width] = page.header.image, side = SAVED_SIDE, canvas = document.createElement("canvas");
  const context = canvas.getContext("2d"), font = (size) => `${size}px ${FONT}`;
  const map = Math.round((side * height) / width);
  context.font = font(18);
  const lines = captionLines(page, (part) => context.measureText(part).width <= side);
  Object.assign(canvas, { width: side + 40, height: map + 90 + 26 * lines.length });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.translate(20, 20);
  drawOverlay(page, context, side, map, page.map, page.state, page.largest);
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
  const { state, header, map } = page, side = SAVED_SIDE, tall = Math.round((side * header.image[0]) / header.image[1]);
  const lines = captionLines(page, (part) => part.length <= 76), table = page.tables[state.colors], { grid, layout } = map;
  const [left, top, width, height] = cellsOn(page, layout, grid, side, tall), opacity = layout.grid ? state.opacity / 100 : 1;
  const rectangle = (x, y, across, down, rest) => `<rect x="${x}" y="${y}" width="${across}" height="${down}" ${rest}/>`;
  const picture = header.groups[state.group].pictures[state.picture].png, parts = [];
  if (layout.grid) parts.push(`<image href="${picture}" width="${side}" height="${tall}" preserveAspectRatio="none"${page.images[state.group][state.picture].naturalWidth > 100 ? "" : ' style="image-rendering:pixelated"'}/>`);
  const areShapes = layout.grid && !state.smooth; // a matrix has too many cells
  if (areShapes) map.values?.forEach((value, cell) => Number.isNaN(value) || parts.push(rectangle(left + (cell % grid[1]) * width,
    top + Math.floor(cell / grid[1]) * height, width, height, `fill="${page.color(value, map.times(cell))}" fill-opacity="${opacity}"`)));
  else if (map.values) {
    drawCells(page, document.createElement("canvas").getContext("2d"), 1, 1, map, table, (value, cell) => page.place(value, map.times(cell))); // for page.grid
    parts.push(`<image href="${page.grid.toDataURL()}" x="${left}" y="${top}" width="${width * grid[1]}" height="${height * grid[0]}" opacity="${opacity}" preserveAspectRatio="none"${state.smooth && layout.grid ? "" : ' style="image-rendering:pixelated"'}/>`);
  }
  const box = map.values && boxOfQuery(page, map, side, tall), marks = box ? [["#000", 8], [state.pinned ? "#ffd60a" : "#fff", 4]] : [];
  for (const [color, thick] of marks) parts.push(rectangle(...box, `fill="none" stroke="${color}" stroke-width="${thick}"`));
  const stops = Array.from({ length: 17 }, (_, index) => {
    const at = 3 * Math.min(255, 16 * index);
    return `<stop offset="${index / 16}" stop-color="rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})"/>`;
  });
  parts.push(`<linearGradient id="scale">${stops.join("")}</linearGradient><rect y="${tall + 12}" width="${side}" height="12" fill="url(#scale)"/>`);
  const ticks = [...element("ticks").children];
  ticks.forEach((tick, index) => parts.push(`<text x="${(side * index) / (ticks.length - 1)}" y="${tall + 42}" font-size="14" text-anchor="${index === 0 ? "start" : index === ticks.length - 1 ? "end" : "middle"}">${escaped(tick.textContent)}</text>`));
  lines.forEach((text, index) => parts.push(`<text y="${tall + 72 + 26 * index}" font-size="18">${escaped(text)}</text>`));
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -20 ${side + 40} ${tall + 100 + 26 * lines.length}" font-family="${FONT}"><rect x="-20" y="-20" width="100%" height="100%" fill="#fff"/>${parts.join("\n")}</svg>\n`;
}

/** Return text as it stands in XML: no markup of its own. */
function escaped(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "");
}

/** Return the numbers of the query's row, or column, with what they are of. */
function csvOf(page) {
  const { header, map } = page, { prefix = Infinity, grid } = map.layout, about = [header.title, captionOf(page), ...header.facts.map((each) => each.join(" ")),
    ...header.warnings.map((text) => `Warning. ${text}`)];
  const lines = [...about.map((text) => `# ${text.replace(/[\r\n]+/g, " ")}`), "token,row,column,weight"];
  map.weights?.forEach((value, token) => {
    const patch = token - prefix, place = patch >= 0 ? [Math.floor(patch / grid[1]) + 1, (patch % grid[1]) + 1] : ["", ""];
    if (!Number.isNaN(value)) lines.push([token + 1, ...place, value.toPrecision(4)].join(","));
  });
  return lines.join("\n") + "\n";
}

/** Cut a text into lines, at spaces and within words that are too long, that `fits` says to be short enough. */
function wrapped(text, fits) {
  const lines = [""];
  for (let word of text.split(" ")) {
    if (lines.at(-1) && !fits(`${lines.at(-1)} ${word}`)) lines.push("");
    for (; !lines.at(-1) && word.length > 1 && !fits(word); lines.push("")) {
      let length = word.length - 1;
      while (length > 1 && !fits(word.slice(0, length))) length--;
      lines[lines.length - 1] = word.slice(0, length);
      word = word.slice(length);
    }
    lines[lines.length - 1] = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
  }
  return lines;
}

/** Copy a text; what: its name, for what is said then. */
async function copied(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = made("textarea", { value: text });
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    if (!isCopied) return say(`the browser does not let ${what} be copied`);
  }
  say(`${what} copied`);
}

/** Say for a while what was done. */
function say(text) {
  element("done").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => (element("done").textContent = ""), 4000);
}

/** Have the browser save a file. */
function saved(blob, name) {
  const link = made("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${name} saved`);
}
