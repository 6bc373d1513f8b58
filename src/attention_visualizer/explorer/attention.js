"use strict";
// What needs no page: decoding the attention that it holds, which tokens it is of, measures.

// --- pure functions ----------------------------------------------------------------------------------------------

/** Return the number that 16 bits stand for in half precision (IEEE 754). */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Return bytes of base64. */
function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let index = 0; index < bytes.length; index++) bytes[index] = characters.charCodeAt(index);
  return bytes;
}

/** Return where a value lies on a scale of `factor` times it, in doublings around 1: 0 to 1. */
function onRelativeScale(value, factor, doublings) {
  const position = (Math.log2(value * factor) + doublings) / (2 * doublings);
  return Math.min(1, Math.max(0, position)); // of 0 the logarithm is -Infinity
}

/** Return the entropy of weights in nats, as shares of their sum, 0 ln 0 = 0; NaN where one is NaN. */
function entropyOf(weights) {
  const sum = weights.reduce((one, other) => one + other, 0);
  let entropy = 0;
  for (const weight of weights) if (weight !== 0) entropy -= (weight / sum) * Math.log(weight / sum);
  return entropy;
}

/** Return one layer's rollout: (attention + identity), rows brought to sum 1, times that of the layer before (null for
 * the first), as Abnar and Zuidema (2020). Matrices of `size` rows as flat arrays. */
function rolloutStep(before, attention, size) {
  const result = new Float32Array(size * size);
  for (let row = 0; row < size; row++) {
    let sum = 1;
    for (let key = 0; key < size; key++) sum += attention[row * size + key];
    for (let key = 0; key < size; key++) {
      const weight = (attention[row * size + key] + (key === row ? 1 : 0)) / sum;
      if (before === null) result[row * size + key] = weight;
      else for (let column = 0; column < size; column++) result[row * size + column] += weight * before[key * size + column];
    }
  }
  return result;
}

/** Return the mean distance in pixels between the patch `query` and the patches, weighted by `weights` [token]. */
function distanceOf(weights, query, layout) {
  const columns = layout.grid[1], patch = query - layout.prefix;
  let sum = 0, mass = 0;
  for (let other = 0; other < layout.grid[0] * columns; other++) {
    const weight = weights[layout.prefix + other];
    if (Number.isNaN(weight)) continue; // outside the window
    const down = (Math.floor(other / columns) - Math.floor(patch / columns)) * layout.patch[0];
    const across = ((other % columns) - (patch % columns)) * layout.patch[1];
    sum += weight * Math.hypot(down, across);
    mass += weight;
  }
  return mass > 0 ? sum / mass : NaN;
}

/** Return the token at a place of the map, given as shares of its sides; null outside the patches. */
function tokenAt(across, down, layout, image) {
  const row = Math.floor((down * image[0] - layout.offset[0]) / layout.patch[0]);
  const column = Math.floor((across * image[1] - layout.offset[1]) / layout.patch[1]);
  if (row < 0 || column < 0 || row >= layout.grid[0] || column >= layout.grid[1]) return null;
  return layout.prefix + row * layout.grid[1] + column;
}

/** Return how many of a layer's tokens are drawn or listed: keys that are no patches, then the patches of all windows. */
function numTokens(layout) {
  return layout.grid ? layout.prefix + layout.grid[0] * layout.grid[1] : layout.keys;
}

/** Return the layout that queries are chosen in: that of the most patches, with as many other tokens as any layer has. */
function referenceOf({ layouts, image }) {
  const placed = layouts.filter((layout) => layout.grid), most = (of) => placed.reduce((one, other) => (of(other) > of(one) ? other : one));
  if (!placed.length) return null;
  const finest = most((layout) => layout.grid[0] * layout.grid[1]), longest = most((layout) => layout.prefix);
  return { ...finest, prefix: longest.prefix, class_token: longest.class_token, image };
}

/** Return the token of a layout where a token of the reference lies: a patch at its middle; null where there is none. */
function tokenIn(layout, token, reference) {
  if (!layout.grid) return null;
  if (token < reference.prefix) return token < layout.prefix ? token : null;
  const patch = token - reference.prefix, middle = [Math.floor(patch / reference.grid[1]), patch % reference.grid[1]]
    .map((line, axis) => (reference.offset[axis] + (line + 0.5) * reference.patch[axis]) / reference.image[axis]);
  return tokenAt(middle[1], middle[0], layout, reference.image);
}

/** Return the patch whose row is shown for a token: itself, or in windows of which only some rows are here the one that
 * stands for it, which may lie across the edge where windows are shifted; null where that is beyond the image. */
function standIn(layout, token) {
  if (!layout.row_of_key || token === null) return token;
  const row = rowOf(layout, token), key = Math.floor(row / layout.rows) * layout.keys + layout.key_of_row[row % layout.rows];
  const patch = layout.key_of_patch.indexOf(key);
  return patch < 0 ? null : layout.prefix + patch;
}

/** Return the number that a weight is times to be relative to uniform attention, as a function of its token. */
function timesUniform(layout, query, isRow) {
  const { keys_in_each: counts, all_keys: all } = layout;
  return !counts ? () => all : isRow ? (token) => all / counts[token] : () => all / counts[query];
}

/** Return the number of the largest weight, -1 where none is a number. */
function largestIn(weights) {
  return weights.reduce((best, weight, index) => (weight > (weights[best] ?? -Infinity) ? index : best), -1);
}

/** Return the window of a token, and its key there. */
function keyOf(layout, token) {
  const key = layout.key_of_patch && token >= layout.prefix ? layout.key_of_patch[token - layout.prefix] : token;
  return [Math.floor(key / layout.keys), key % layout.keys];
}

/** Return the number of the row that shows what a token attends to. */
function rowOf(layout, token) {
  const [window, key] = keyOf(layout, token);
  return window * layout.rows + (layout.row_of_key ? layout.row_of_key[key] : key);
}

/** Return the number of heads of the layer with the most. */
function headsOf({ layers }) {
  return Math.max(...layers.map((layer) => layer.heads));
}

/** Return the number of queries in the list of the layer with the longest: of queries that are no patches. */
function queriesInList({ layouts }) {
  return Math.max(0, ...layouts.filter((layout) => !layout.are_queries_patches).map((layout) => layout.windows * layout.rows));
}

/** Return the columns of the table, by their names in an address: each head's number from 1, "mean", and "rollout" where
 * layers hand on the same tokens and a browser computes it in less than a second, and other methods. */
function columnsOf(header) {
  const heads = Array.from({ length: headsOf(header) }, (_, head) => String(head + 1));
  return [...heads, "mean", ...(header.rollout && header.layouts[0].keys <= 400 ? ["rollout"] : []), ...methodsOf(header)];
}

/** Return the methods that are known of some pictures, beside the attention. */
function methodsOf({ groups }) {
  return [...new Set(groups.flatMap((group) => group.methods))];
}

/** Whether a layer has such a column: not all have as many heads. */
function hasColumn(header, layer, head) {
  return head < header.layers[layer].heads || head >= headsOf(header);
}

/** Return how many doublings lie between two weights, both at least the low end of the scale: -2 to 2 times it. */
function doublingsBetween(one, other, factor, doublings) {
  const lowest = 2 ** -doublings;
  return Math.log2(Math.max(other * factor, lowest)) - Math.log2(Math.max(one * factor, lowest));
}

/** Return half of the sum of absolute differences: 0 for equal distributions, 1 for those that share nothing. What lies
 * outside a window, NaN, is 0. */
function totalVariation(one, other) {
  return one.reduce((sum, weight, token) => sum + Math.abs((weight || 0) - (other[token] || 0)) / 2, 0);
}

// --- the attention -----------------------------------------------------------------------------------------------

/** The attention that the page holds: codes in 255ths of each row's maximum. A view names a group, a moment, a picture, and
 * the query: a token of the reference, and `item`, the number of a row of layers whose queries are no patches. */
class Attention {
  constructor(header, bytes) {
    this.header = header;
    this.reference = referenceOf(header);
    this.layouts = header.layers.map((layer) => header.layouts[layer.layout]);
    let start = 0;
    this.parts = header.groups.map((group) => header.layers.map(({ heads }, layer) => {
      const { windows, rows, keys } = this.layouts[layer], maps = group.moments.length * group.pictures.length * (heads + group.methods.length);
      const all = maps * windows * rows;
      const part = { codes: start, maximum: start + all * keys, entropy: start + all * (keys + 2) };
      start += all * (keys + 4);
      return part;
    }));
    if (start !== bytes.length) throw new Error(`the page holds ${bytes.length} bytes of attention, not ${start}: it is damaged`);
    this.bytes = bytes;
    this.rollouts = new Map(); // of the last views
    this.matrices = new Map(); // of the last picture
  }

  /** Return the number of a head's first row, among those of its layer and group. */
  first({ group, moment, picture }, layer, head) {
    const { windows, rows } = this.layouts[layer], { pictures, methods } = this.header.groups[group];
    return ((moment * pictures.length + picture) * (this.header.layers[layer].heads + methods.length) + head) * windows * rows;
  }

  _half(start, number) {
    return half(this.bytes[start + 2 * number] | (this.bytes[start + 2 * number + 1] << 8));
  }

  /** Return the number of the row of a view's query in a layer; null where the layer has none. */
  row({ query, item }, layer) {
    const layout = this.layouts[layer];
    if (!layout.are_queries_patches) return Math.min(item, layout.windows * layout.rows - 1);
    const token = tokenIn(layout, query, this.reference);
    return token === null ? null : rowOf(layout, token);
  }

  /** Return the entropy of a head's row in nats, as it was before it was packed; NaN where the layer has no such row. */
  entropy(view, layer, head) {
    const row = this.row(view, layer);
    return row === null ? NaN : this._half(this.parts[view.group][layer].entropy, this.first(view, layer, head) + row);
  }

  /** Return the entropy of what a query attends to in a view: a head's as it was before it was packed, that of the mean or
   * of a rollout from its weights; NaN where these are of cells. */
  entropyOfView(view, weights) {
    if (weights === null) return NaN;
    if (view.head < headsOf(this.header)) return this.entropy(view, view.layer, view.head);
    return this.layouts[view.layer].has_cells ? NaN : entropyOf(weights.filter((weight) => !Number.isNaN(weight)));
  }

  /** Return a head's weights, a number for each token of its layer: what the query attends to ("row"), or what attends to
   * it ("column"). NaN outside of the query's window; null where the layer has no such query. */
  ofHead(view, layer, head) {
    const layout = this.layouts[layer], part = this.parts[view.group][layer], first = this.first(view, layer, head);
    const { keys, rows } = layout, tokens = numTokens(layout);
    const isRow = view.direction === "row" || !layout.are_queries_patches; // what attends to a key is not shown of lists
    const query = layout.are_queries_patches ? tokenIn(layout, view.query, this.reference) : null;
    const row = this.row(view, layer);
    if (row === null || (!isRow && query === null)) return null;
    const result = new Float32Array(tokens), window = isRow ? Math.floor(row / rows) : keyOf(layout, query)[0];
    const maximum = this._half(part.maximum, first + row) / 255, column = isRow ? 0 : keyOf(layout, query)[1];
    for (let token = 0; token < tokens; token++) {
      const key = layout.key_of_patch ? layout.key_of_patch[token] - window * keys : token; // windows have no other tokens
      if (key < 0 || key >= keys) result[token] = NaN;
      else if (isRow) result[token] = this.bytes[part.codes + (first + row) * keys + key] * maximum;
      else {
        const from = first + window * rows + (layout.row_of_key ? layout.row_of_key[key] : key);
        result[token] = (this.bytes[part.codes + from * keys + column] / 255) * this._half(part.maximum, from);
      }
    }
    return result;
  }

  /** Return the mean over heads. */
  mean(view, layer) {
    const { heads } = this.header.layers[layer];
    let result = null;
    for (let head = 0; head < heads; head++) {
      const each = this.ofHead(view, layer, head);
      if (each === null) return null;
      result ??= new Float32Array(each.length);
      for (let token = 0; token < each.length; token++) result[token] += each[token] / heads;
    }
    return result;
  }

  /** Return the rollout up to and including a layer. */
  rollout(view, layer) {
    const tokens = numTokens(this.layouts[0]), key = `${view.group},${view.moment},${view.picture}`, layers = this.rollouts.get(key) ?? [];
    this.rollouts.delete(key); // now the last one
    this.rollouts.set(key, layers);
    if (this.rollouts.size > 2) this.rollouts.delete(this.rollouts.keys().next().value);
    for (let next = layers.length; next <= layer; next++) {
      const attention = new Float32Array(tokens * tokens);
      for (let row = 0; row < tokens; row++) attention.set(this.mean({ ...view, query: row, direction: "row" }, next), row * tokens);
      layers.push(rolloutStep(layers[next - 1] ?? null, attention, tokens));
    }
    const matrix = layers[layer], result = new Float32Array(tokens);
    for (let other = 0; other < tokens; other++)
      result[other] = view.direction === "row" ? matrix[view.query * tokens + other] : matrix[other * tokens + view.query];
    return result;
  }

  /** Return the weights of a column of the table: a head's, their mean or the rollout. */
  of(view, layer, head) {
    const heads = headsOf(this.header), name = columnsOf(this.header)[head];
    if (head < heads) return this.ofHead(view, layer, head);
    if (name === "mean" || name === "rollout") return name === "mean" ? this.mean(view, layer) : this.rollout(view, layer);
    const method = this.header.groups[view.group].methods.indexOf(name); // behind the heads
    return method < 0 ? null : this.ofHead(view, layer, this.header.layers[layer].heads + method);
  }

  /** Return all rows of a head, or of the mean, of a layer without places, one after the other: its matrix. */
  matrix(view, layer, head) {
    const of = `${view.group},${view.moment},${view.picture}`, name = `${of},${layer},${head}`;
    if (this.matricesOf !== of) this.matrices.clear();
    this.matricesOf = of;
    if (!this.matrices.has(name)) {
      const { windows, rows, keys } = this.layouts[layer], matrix = new Float32Array(windows * rows * keys);
      for (let item = 0; item < windows * rows; item++) matrix.set(this.of({ ...view, item, direction: "row" }, layer, head), item * keys);
      this.matrices.set(name, matrix);
    }
    return this.matrices.get(name);
  }
}

/** Return the bytes that were packed as raw deflate. */
async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return a share in words. */
function percent(value) {
  return value < 0.001 && value > 0 ? "< 0.1%" : `${(100 * value).toFixed(1)}%`;
}
