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

/** Return the entropy of weights in nats, 0 ln 0 = 0; NaN where one is NaN. */
function entropyOf(weights) {
  let sum = 0;
  for (const weight of weights) if (weight !== 0) sum -= weight * Math.log(weight);
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

/** Return what to call a token. */
function nameOfToken(token, layout) {
  if (token >= layout.prefix) {
    const patch = token - layout.prefix;
    return `patch in row ${Math.floor(patch / layout.grid[1]) + 1}, column ${(patch % layout.grid[1]) + 1}`;
  }
  const isClass = token === 0 && layout.class_token !== "absent";
  return isClass ? "class token" : `prefix token ${token + 1}`;
}

/** Return what to call a map: a head's, that of a layer or a rollout. */
function nameOfMap(layer, head, layout) {
  if (head < layout.heads) return `head ${layer + 1}.${head + 1}`;
  return head === layout.heads ? `layer ${layer + 1}, mean over heads` : `rollout up to layer ${layer + 1}`;
}

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

/** Return the columns of the table, by their names in an address: each head's number from 1, "mean", and "rollout" where
 * a browser computes it in less than a second. */
function columnsOf(layout) {
  const heads = Array.from({ length: layout.heads }, (_, head) => String(head + 1));
  return [...heads, "mean", ...(layout.tokens <= 400 ? ["rollout"] : [])];
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

/** Return a view, of a group, picture, moment, layer and column, as it stands in an address. */
function partsOf(view, header) {
  const { key, moments } = header.groups[view.group];
  return [key, view.picture + 1, addressOfMoment(moments, view.moment), view.layer + 1, columnsOf(header.layout)[view.head]];
}

/** Return the view of such parts, each null where it is of none. */
function viewOf([key, picture, moment, layer, head], header) {
  const group = header.groups.findIndex((each) => each.key === key), of = header.groups[group];
  const column = columnsOf(header.layout).indexOf(head);
  return { group: group < 0 ? null : group, picture: numberOf(picture, of?.pictures.length ?? 0),
    moment: momentOfAddress(moment, of?.moments ?? []), layer: numberOf(layer, header.layout.layers), head: column < 0 ? null : column };
}

/** Return a state's part of the address. */
function addressOf(state, header) {
  const [images, image, moment, layer, head] = partsOf(state, header);
  const fields = { images, image, moment, layer, head, query: addressOfToken(state.query, header.layout),
    direction: state.direction, colors: state.colors, opacity: state.opacity, smooth: state.smooth ? 1 : 0 };
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
  take("query", tokenOfAddress(fields.get("query") ?? "", header.layout));
  take("direction", one("direction", ["row", "column"]));
  take("colors", one("colors", ["relative", "share"]));
  take("filter", one("filter", filtersOf(header)));
  const opacity = fields.get("opacity");
  take("opacity", /^\d+$/.test(opacity ?? "") && opacity <= 100 ? Number(opacity) : null);
  for (const name of ["smooth", "pinned"]) take(name, one(name, ["0", "1"]) && fields.get(name) === "1");
  const kept = viewOf((fields.get("kept") ?? "").split("."), header);
  take("kept", Object.values(kept).includes(null) ? null : kept);
  return { ...result, unknown };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
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
    this.rollouts = new Map(); // of the last views
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

  /** Return the entropy of what a query attends to in a view: a head's as it was before it was packed, that of the mean or
   * of a rollout from its weights. */
  entropyOfView({ group, moment, picture, layer, head }, query, weights) {
    return head < this.layout.heads ? this.entropy(group, moment, picture, layer, head, query) : entropyOf(weights);
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
    const { tokens } = this.layout, key = `${group},${moment},${picture}`, layers = this.rollouts.get(key) ?? [];
    this.rollouts.delete(key); // now the last one
    this.rollouts.set(key, layers);
    if (this.rollouts.size > 2) this.rollouts.delete(this.rollouts.keys().next().value);
    for (let next = layers.length; next <= layer; next++) {
      const attention = new Float32Array(tokens * tokens);
      for (let row = 0; row < tokens; row++) attention.set(this.mean(group, moment, picture, next, row, "row"), row * tokens);
      layers.push(rolloutStep(layers[next - 1] ?? null, attention, tokens));
    }
    const matrix = layers[layer], result = new Float32Array(tokens);
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

/** Return the bytes that were packed as raw deflate. */
async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return a share in words. */
function percent(value) {
  return value < 0.001 && value > 0 ? "< 0.1%" : `${(100 * value).toFixed(1)}%`;
}

const pure = { half, bytesOf, onRelativeScale, entropyOf, rolloutStep, distanceOf, tokenAt, addressOfToken, tokenOfAddress,
  addressOf, stateOf, filtersOf, columnsOf, doublingsBetween, totalVariation, passes, Attention };
