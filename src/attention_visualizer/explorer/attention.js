"use strict";
// What needs no page: decoding the attention that it holds, measures, and a view as an address.

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
  return Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
}

/** Return where a value lies on a scale of `factor` times it, in doublings around 1: 0 to 1. */
function onRelativeScale(value, factor, doublings) {
  const position = (Math.log2(value * factor) + doublings) / (2 * doublings);
  return Math.min(1, Math.max(0, position)); // of 0 the logarithm is -Infinity
}

/** Return the entropy of weights in nats, 0 ln 0 = 0. */
function entropyOf(weights) {
  let sum = 0;
  for (const weight of weights) if (weight > 0) sum -= weight * Math.log(weight);
  return sum;
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

/** Return the mean distance in pixels between patch `query` and the patches, weighted by `weights` [token]. */
function distanceOf(weights, query, layout) {
  const columns = layout.grid[1], patch = query - layout.prefix;
  let sum = 0, mass = 0;
  for (let other = 0; other < layout.tokens - layout.prefix; other++) {
    const down = (Math.floor(other / columns) - Math.floor(patch / columns)) * layout.patch[0];
    const across = ((other % columns) - (patch % columns)) * layout.patch[1];
    sum += weights[layout.prefix + other] * Math.hypot(down, across);
    mass += weights[layout.prefix + other];
  }
  return mass > 0 ? sum / mass : NaN;
}

/** Return the token at a place of the map, given as shares of its sides; null outside the patches. */
function tokenAt(across, down, layout) {
  const row = Math.floor((down * layout.image[0] - layout.offset[0]) / layout.patch[0]);
  const column = Math.floor((across * layout.image[1] - layout.offset[1]) / layout.patch[1]);
  if (row < 0 || column < 0 || row >= layout.grid[0] || column >= layout.grid[1]) return null;
  return layout.prefix + row * layout.grid[1] + column;
}

/** Return the name of a token in an address: "token0" for those that are no patches, "row,column" for patches. */
function addressOfToken(token, layout) {
  if (token < layout.prefix) return `token${token}`;
  const patch = token - layout.prefix;
  return `${Math.floor(patch / layout.grid[1])},${patch % layout.grid[1]}`;
}

/** Return the token of such a name; null for names of none. */
function tokenOfAddress(text, layout) {
  const other = /^token(\d+)$/.exec(text), patch = /^(\d+),(\d+)$/.exec(text);
  if (other) return Number(other[1]) < layout.prefix ? Number(other[1]) : null;
  if (!patch || patch[1] >= layout.grid[0] || patch[2] >= layout.grid[1]) return null;
  return layout.prefix + Number(patch[1]) * layout.grid[1] + Number(patch[2]);
}

/** Return the name of a head's column in an address: its number from 1, "mean" or "rollout". */
function addressOfHead(head, layout) {
  return head < layout.heads ? String(head + 1) : ["mean", "rollout"][head - layout.heads];
}

/** Return a state's part of the address. */
function addressOf(state, header) {
  const layout = header.layout;
  const fields = { images: state.group + 1, image: state.picture + 1, moment: state.moment + 1,
    layer: state.layer + 1, head: addressOfHead(state.head, layout), query: addressOfToken(state.query, layout),
    direction: state.direction, colors: state.colors, opacity: state.opacity, smooth: state.smooth ? 1 : 0 };
  if (state.pinned) fields.pinned = 1;
  if (state.filter !== "all") fields.filter = encodeURIComponent(state.filter);
  if (state.kept) fields.kept = [...["group", "picture", "moment", "layer"].map((name) => state.kept[name] + 1),
    addressOfHead(state.kept.head, layout)].join(".");
  return "#" + Object.entries(fields).map(([name, value]) => `${name}=${value}`).join("&");
}

/** Return `state` with what an address says of it; what is not there, or is not possible, stays as it is. */
function stateOf(address, header, state) {
  const fields = Object.fromEntries(address.replace(/^#/, "").split("&").map((field) => field.split("=")));
  const layout = header.layout, result = { ...state };
  const number = (name, count) => /^\d+$/.test(fields[name] ?? "") && fields[name] >= 1 && fields[name] <= count;
  if (number("images", header.groups.length)) result.group = fields.images - 1;
  const group = header.groups[result.group];
  result.picture = number("image", group.pictures.length) ? fields.image - 1 : Math.min(result.picture, group.pictures.length - 1);
  result.moment = number("moment", group.moments.length) ? fields.moment - 1 : Math.min(result.moment, group.moments.length - 1);
  if (number("layer", layout.layers)) result.layer = fields.layer - 1;
  for (let head = 0; head < layout.heads + 2; head++) if (addressOfHead(head, layout) === fields.head) result.head = head;
  result.query = tokenOfAddress(fields.query ?? "", layout) ?? result.query;
  if (["row", "column"].includes(fields.direction)) result.direction = fields.direction;
  if (["relative", "share"].includes(fields.colors)) result.colors = fields.colors;
  if (/^\d+$/.test(fields.opacity ?? "") && fields.opacity <= 100) result.opacity = Number(fields.opacity);
  if (["0", "1"].includes(fields.smooth)) result.smooth = fields.smooth === "1";
  if (["0", "1"].includes(fields.pinned)) result.pinned = fields.pinned === "1";
  if (fields.filter !== undefined) result.filter = decoded(fields.filter);
  if (fields.kept !== undefined) result.kept = keptOf(fields.kept.split("."), header);
  return result;
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "all";
  }
}

/** Return the view that an address keeps to compare with; null where it is of none. */
function keptOf(parts, header) {
  const layout = header.layout, [group, picture, moment, layer] = parts.slice(0, 4).map((part) => (/^\d+$/.test(part) ? part - 1 : -1));
  const head = Array.from({ length: layout.heads + 2 }, (_, each) => addressOfHead(each, layout)).indexOf(parts[4]);
  const of = header.groups[group], isOne = (number, all) => number >= 0 && number < all;
  if (!of || !isOne(picture, of.pictures.length) || !isOne(moment, of.moments.length) || !isOne(layer, layout.layers) || head < 0) return null;
  return { group, picture, moment, layer, head };
}

/** Return how many doublings lie between two weights, both at least the low end of the scale: -2 to 2 times it. */
function doublingsBetween(one, other, factor, doublings) {
  const lowest = 2 ** -doublings;
  return Math.log2(Math.max(other * factor, lowest)) - Math.log2(Math.max(one * factor, lowest));
}

/** Return half of the sum of absolute differences: 0 for equal distributions, 1 for those that share nothing. */
function totalVariation(one, other) {
  return one.reduce((sum, weight, token) => sum + Math.abs(weight - other[token]) / 2, 0);
}

/** Whether a picture passes a filter: "all", "right", "wrong", "class NAME" or "confused TRUE, PREDICTED". */
function passes(filter, label, predicted) {
  if (filter === "right" || filter === "wrong") return label !== null && predicted !== null && (label === predicted) === (filter === "right");
  if (filter.startsWith("class ")) return label === filter.slice(6);
  return !filter.startsWith("confused ") || (label !== null && predicted !== null && label !== predicted && filter === `confused ${label}, ${predicted}`);
}

// --- the attention -----------------------------------------------------------------------------------------------

/** The attention that the page holds: codes in 255ths of each row's maximum. */
class Attention {
  constructor(header, bytes) {
    this.layout = header.layout;
    this.parts = [];
    let start = 0;
    const { layers, heads, tokens } = this.layout;
    for (const group of header.groups) {
      const rows = group.moments.length * group.pictures.length * layers * heads * tokens;
      const part = { pictures: group.pictures.length, codes: start, maximum: start + rows * tokens };
      part.entropy = part.maximum + 2 * rows;
      start = part.entropy + 2 * rows;
      this.parts.push(part);
    }
    if (start !== bytes.length) throw new Error(`the page holds ${bytes.length} bytes of attention, not ${start}: it is damaged`);
    this.bytes = bytes;
    this.rollouts = { key: "", layers: [] };
  }

  /** Return the number of a row: of a moment, picture, layer, head and query. */
  number(group, moment, picture, layer, head, query) {
    const { layers, heads, tokens } = this.layout;
    return (((moment * this.parts[group].pictures + picture) * layers + layer) * heads + head) * tokens + query;
  }

  _half(start, number) {
    return half(this.bytes[start + 2 * number] | (this.bytes[start + 2 * number + 1] << 8));
  }

  /** Return the entropy of a head's row in nats, as it was before it was packed. */
  entropy(group, moment, picture, layer, head, query) {
    return this._half(this.parts[group].entropy, this.number(group, moment, picture, layer, head, query));
  }

  /** Return the weights of a head: what `query` attends to ("row"), or what attends to it ("column"). */
  ofHead(group, moment, picture, layer, head, query, direction) {
    const { tokens } = this.layout, part = this.parts[group], result = new Float32Array(tokens);
    const first = this.number(group, moment, picture, layer, head, 0);
    for (let other = 0; other < tokens; other++) {
      const [row, key] = direction === "row" ? [first + query, other] : [first + other, query];
      const maximum = direction === "row" && other ? result.maximum : this._half(part.maximum, row);
      if (direction === "row") result.maximum = maximum;
      result[other] = (this.bytes[part.codes + row * tokens + key] / 255) * maximum;
    }
    return result;
  }

  /** Return the mean over heads. */
  mean(group, moment, picture, layer, query, direction) {
    const { heads, tokens } = this.layout, result = new Float32Array(tokens);
    for (let head = 0; head < heads; head++) {
      const each = this.ofHead(group, moment, picture, layer, head, query, direction);
      for (let token = 0; token < tokens; token++) result[token] += each[token] / heads;
    }
    return result;
  }

  /** Return the rollout up to and including a layer. */
  rollout(group, moment, picture, layer, query, direction) {
    const { tokens } = this.layout, key = `${group},${moment},${picture}`;
    if (this.rollouts.key !== key) this.rollouts = { key, layers: [] };
    for (let next = this.rollouts.layers.length; next <= layer; next++) {
      const attention = new Float32Array(tokens * tokens);
      for (let row = 0; row < tokens; row++) attention.set(this.mean(group, moment, picture, next, row, "row"), row * tokens);
      this.rollouts.layers.push(rolloutStep(this.rollouts.layers[next - 1] ?? null, attention, tokens));
    }
    const matrix = this.rollouts.layers[layer], result = new Float32Array(tokens);
    for (let other = 0; other < tokens; other++)
      result[other] = direction === "row" ? matrix[query * tokens + other] : matrix[other * tokens + query];
    return result;
  }

  /** Return the weights of a column of the table: a head's, their mean or the rollout. */
  of({ group, moment, picture, query, direction }, layer, head) {
    const { heads } = this.layout;
    if (head < heads) return this.ofHead(group, moment, picture, layer, head, query, direction);
    return head === heads ? this.mean(group, moment, picture, layer, query, direction)
      : this.rollout(group, moment, picture, layer, query, direction);
  }
}

const pure = { half, bytesOf, onRelativeScale, entropyOf, rolloutStep, distanceOf, tokenAt, addressOfToken,
  tokenOfAddress, addressOf, stateOf, doublingsBetween, totalVariation, passes, Attention };
