// What the page says of tokens, maps and the view that is shown.

/** Return what to call a token, or a key of a layer without patches. */
function nameOfToken(token, layout) {
  if (!layout.grid) return `key ${token + 1}`;
  if (token >= layout.prefix) {
    const patch = token - layout.prefix, kind = layout.has_cells ? "cell" : "patch";
    return `${kind} in row ${Math.floor(patch / layout.grid[1]) + 1}, column ${(patch % layout.grid[1]) + 1}`;
  }
  const isClass = token === 0 && layout.class_token !== "absent";
  return isClass ? "class token" : `prefix token ${token + 1}`;
}

/** Return what to call a map: a head's, that of a layer or a rollout. */
function nameOfMap(layer, head, header) {
  const most = headsOf(header), name = columnsOf(header)[head];
  const { number } = header.layers[layer];
  if (head < most) return `head ${number}.${head + 1}`;
  if (name === "mean") return `layer ${number}, mean over heads`;
  return name === "rollout" || name === "relevance" ? `${name} up to layer ${number}` : `layer ${number}, ${name}`;
}

/** Return what to call the query of the layer that is shown. */
function nameOfQuery(page) {
  const { layout } = page.map, { query, item } = page.state;
  if (!layout.are_queries_patches) {
    const row = Math.min(item, layout.windows * layout.rows - 1), step = layout.stride ** 2;
    const window = layout.windows > 1 ? ` of window ${Math.floor(row / layout.rows) + 1}` : "";
    return `query ${(row % layout.rows) * step + 1} of ${layout.queries}${window}`;
  }
  const own = tokenIn(layout, query, page.layout), token = page.direction === "row" ? standIn(layout, own) ?? own : own;
  const middle = token >= layout.prefix && layout.has_cells ? "middle of the " : "";
  return token === null ? `the ${nameOfToken(query, page.layout)}` : `the ${middle}${nameOfToken(token, layout)}`;
}

/** Return what the map that is shown is of. */
function captionOf(page) {
  const { state } = page, group = page.header.groups[state.group], moment = group.moments[state.moment];
  const picture = group.pictures[state.picture], predicted = moment.predicted[state.picture];
  const probability = moment.probability[state.picture];
  const said = [picture.label === null ? null : `class ${picture.label}`,
    predicted === null ? null : `predicted ${predicted}` + (probability === null ? "" : ` (${percent(probability)})`)];
  const isMethod = methodsOf(page.header).includes(page.columns[state.head]), name = nameOfQuery(page);
  const query = page.direction === "row" ? (isMethod ? `what contributes to ${name}` : `what ${name} attends to`)
    : isMethod ? `what ${name} contributes to` : `what attends to ${name}`;
  return [[picture.name, ...said.filter((each) => each !== null)].join(", "), nameOfMap(state.layer, state.head, page.header),
    query + (page.state.pinned ? ", pinned" : ""), moment.title].join(" · ");
}

/** Return what is peculiar of the layer that is shown. */
function aboutLayer(page) {
  const { layout, weights } = page.map, texts = [], isList = !layout.are_queries_patches;
  if (!layout.grid) texts.push(`Where this layer's keys lie on the image is not known: ${layout.unplaced}. It is drawn as a matrix, rows are queries and columns keys.`);
  else if (isList && layout.queries === 1) texts.push("It has one query only.");
  else if (isList) texts.push(`Its queries are not its ${layout.all_keys} keys, and where they lie is not measured: choose one by its number. What attends to a key is not shown.`);
  else if (layout.key_of_patch) texts.push(`It attends inside ${layout.windows} windows: outside of the query's, the image is bare.`);
  if (layout.row_of_key) texts.push("Rows of some patches only are here: the marked one stands for those around it.");
  const isMethod = page.header.groups[page.state.group].methods.includes(page.columns[page.state.head]);
  if (weights === null && methodsOf(page.header).includes(page.columns[page.state.head]) && !isMethod) texts.push("This method is known of the samples only.");
  else if (weights === null) texts.push("It has no such query.");
  return texts.join(" ");
}

/** Return the numbers that stand beside the map: name, text. */
function numbersOf(page) {
  const { state } = page, { layout, weights } = page.map, numbers = [], largest = weights === null ? -1 : largestIn(weights);
  const all = layout.all_keys, own = layout.are_queries_patches ? tokenIn(layout, state.query, page.layout) : null;
  const token = page.direction === "row" ? standIn(layout, own) : own;
  if (largest < 0) numbers.push(["no numbers", weights === null ? "there is no such map" : "the attention is not a number here"]);
  else if (weights[largest] === 0) numbers.push(["nothing", "every weight is 0 here"]);
  else if (page.direction === "row") {
    const entropy = page.attention.entropyOfView(state, weights);
    const name = page.columns[state.head], of = state.head < page.numHeads ? "" : name === "mean" ? " of the mean map" : ` of ${name}`;
    if (!Number.isNaN(entropy)) numbers.push([`entropy${of}`, `${entropy.toFixed(2)} nats of ${Math.log(all).toFixed(2)}`],
      ["effective tokens", `${Math.exp(entropy).toFixed(1)} of ${all}`]);
    numbers.push(["largest", `${percent(weights[largest])}, ${nameOfToken(largest, layout)}`]);
    if (token !== null) numbers.push([layout.has_cells && token >= layout.prefix ? "its own cell" : "itself", percent(weights[token])]);
    if (token !== null && token >= layout.prefix) numbers.push(["mean distance", `${distanceOf(weights, token, layout).toFixed(1)} pixels`]);
  } else {
    const given = weights.filter((weight) => !Number.isNaN(weight)), mean = given.reduce((one, other) => one + other) / given.length;
    const times = page.map.times(token - layout.prefix);
    numbers.push(["receives", `${percent(mean)} of ${layout.windows > 1 ? "its window's" : "all"} attention, ${(mean * times).toFixed(2)}× uniform`]);
    numbers.push(["most from", `${nameOfToken(largest, layout)}, ${percent(weights[largest])} of its attention`]);
  }
  return numbers;
}
