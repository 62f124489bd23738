"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const GAP = 2;
  const LEAST = matchMedia("(pointer: coarse)").matches ? 14 : 7; // pixels that can still be hit
  const LETTER = 6.7; // width of one in a block's label
  const LEFT = 4; // of the track's padding
  const TIME = ["µs", "ms", "s"];
  const BYTES = ["B", "kB", "MB", "GB", "TB"];
  const OUTSIDE = "outside the layers";

  // The data, with numbers replaced by what they stand for.
  const named = (type, row) => Object.fromEntries(data.fields[type].map((name, i) => [name, row[i]]));
  const lines = data.lines.map((row) => named("Line", row));
  const values = data.values.map((row) => named("Value", row));
  const text = (number) => data.texts[number];
  const variants = data.variants.map(({ name, title, kernels }) => ({
    name,
    title,
    kernels: kernels.map((row) => {
      const kernel = named("Kernel", row);
      for (const key of ["name", "kind", "fusion", "module", "code"]) kernel[key] = text(kernel[key]);
      for (const key of ["ops", "nodes"]) kernel[key] = kernel[key].map(text);
      kernel.lines = kernel.lines.map((number) => lines[number]);
      for (const key of ["inputs", "outputs"]) kernel[key] = kernel[key].map((number) => values[number]);
      return Object.assign(kernel, { id: `${name}:${kernel.index}`, short: shortName(kernel.name) });
    }),
  }));
  const timed = variants.some((variant) => variant.kernels.some((kernel) => kernel.microseconds !== null));
  const byId = new Map();
  for (const variant of variants) {
    variant.byNode = new Map();
    for (const kernel of variant.kernels) {
      kernel.variant = variant;
      byId.set(kernel.id, kernel);
      for (const node of kernel.nodes) {
        if (!variant.byNode.has(node)) variant.byNode.set(node, []);
        variant.byNode.get(node).push(kernel);
      }
    }
  }
  const labels = new Map(data.layers); // layer -> its kind
  const layers = data.layers.map(([index]) => index);
  if (variants.some((variant) => variant.kernels.some((kernel) => kernel.layer === null))) {
    layers.push(null);
    labels.set(null, OUTSIDE);
  }
  const layerName = (layer) => (layer === null ? OUTSIDE : `layer ${layer}`);
  const state = { layer: layers[0], kernel: null, pointed: null, measure: timed ? "time" : "bytes", overview: timed ? "time" : "bytes" };

  function shortName(name) {
    if (/^(triton|cpp)_/.test(name)) return name.replace(/^(triton|cpp)_/, "").replace(/_\d+$/, "").replace(/__to_copy/g, "");
    const parts = name.split(".");
    const last = name.startsWith("torch.ops.") && parts.length > 3 ? parts[3] : parts[parts.length - 1];
    return last.replace(/^_+/, "").replace("scaled_dot_product", "sdpa");
  }

  // Numbers for people: three digits and a unit.
  function scaled(value, units) {
    if (!value) return `0\u00a0${units[0]}`;
    let unit = 0;
    for (; value >= 999.5 && unit < units.length - 1; unit++) value /= 1000;
    const digits = units[unit] === "B" ? 0 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
    return `${value.toFixed(digits)}\u00a0${units[unit]}`;
  }
  const time = (value) => (value === null ? "not measured" : scaled(value, TIME));
  const size = (value) => scaled(value, BYTES);
  const plural = (count, word, many = `${word}s`) => `${count.toLocaleString("en")}\u00a0${count === 1 ? word : many}`;
  const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);
  const MEASURES = {
    time: { label: "Time", of: (kernel) => kernel.microseconds ?? 0, show: (value) => scaled(value, TIME), units: TIME },
    bytes: { label: "Bytes", of: (kernel) => kernel.bytes, show: size, units: BYTES },
    equal: { label: "Equal", of: () => 1, show: (value) => plural(value, "kernel") },
    count: { label: "Launches", of: (kernel) => kernel.launches, show: (value) => plural(value, "launch", "launches") },
  };
  const launches = (kernels) => MEASURES.count.show(sum(kernels, MEASURES.count.of));
  const totalTime = (kernels) => (timed ? time(sum(kernels, MEASURES.time.of)) : null);
  function change(before, after) {
    const percent = before ? Math.round((100 * (after - before)) / before) : 0;
    return `${percent > 0 ? "+" : percent < 0 ? "−" : ""}${Math.abs(percent)}\u00a0%`;
  }

  // Data reaches the page as text nodes and attributes only, never as markup.
  function el(tag, attributes = {}, ...children) {
    const element = ["svg", "polygon"].includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }
  const button = (attributes, ...children) => el("button", { type: "button", ...attributes }, ...children);
  const $ = (selector) => document.querySelector(selector);
  const broken = (path) => path.split(/(?<=\.)/).flatMap((part) => [el("wbr"), part]); // long paths break at dots first
  const swatch = (kind) => el("span", { class: "swatch", "data-kind": kind, "aria-hidden": "true" });

  // New buttons for old ones, with the focus where it was.
  function renew(container, buttons) {
    const place = [...container.children].indexOf(document.activeElement);
    container.replaceChildren(...buttons);
    if (place >= 0) (buttons[place].disabled ? buttons[1] : buttons[place]).focus({ preventScroll: true });
  }

  // Arrow keys walk through the buttons of a container, which is one stop of the Tab key.
  function roving(container, chosen, other = () => null) {
    const buttons = [...container.querySelectorAll("button")];
    const stop = chosen && buttons.includes(chosen) ? chosen : buttons[0];
    for (const button of buttons) button.tabIndex = button === stop ? 0 : -1;
    container.onkeydown = (event) => {
      const here = buttons.indexOf(document.activeElement);
      const next = {
        ArrowLeft: () => buttons[here - 1],
        ArrowRight: () => buttons[here + 1],
        Home: () => buttons[0],
        End: () => buttons[buttons.length - 1],
        ArrowUp: other,
        ArrowDown: other,
      }[event.key];
      const target = here < 0 ? null : next?.();
      if (!target) return;
      event.preventDefault();
      document.activeElement.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    };
  }

  const ofLayer = (variant, layer) => variant.kernels.filter((kernel) => kernel.layer === layer);
  function related(kernel) {
    const found = new Set();
    for (const variant of variants) {
      if (variant === kernel.variant) continue;
      for (const node of kernel.nodes) for (const other of variant.byNode.get(node) ?? []) found.add(other);
    }
    return [...found].sort((a, b) => a.index - b.index);
  }

  function show(layer, kernel = null) {
    const rows = variants.map((variant) => ofLayer(variant, layer));
    if (!kernel) {
      // The same place as in the layer before, where that is the same kernel; else what this package made.
      const before = byId.get(state.kernel);
      const place = before ? ofLayer(before.variant, before.layer).indexOf(before) : -1;
      const same = before ? ofLayer(before.variant, layer)[place] : null;
      const row = rows[rows.length - 1].concat(rows[0]);
      kernel = same?.short === before?.short && same ? same : row.find((k) => k.kind === "ours") ?? row[0] ?? null;
    }
    Object.assign(state, { layer, kernel: kernel?.id ?? null, pointed: null });
    remember();
    for (const draw of [drawFigure, drawTabs, drawStage, drawLegend, drawDetail, drawOverview]) draw();
  }

  function drawFigure() {
    const counts = variants.map((variant) => sum(ofLayer(variant, state.layer), MEASURES.count.of));
    const [before, after] = [counts[0], counts[counts.length - 1]];
    const tone = after < before ? "less" : after > before ? "more" : "";
    const name = (kind, ...words) => el("span", { class: kind }, ...words);
    const compared = counts.length > 1 ? [name("before", String(before)), " ", name("arrow", "→"), " "] : [];
    $("#layer-figure").replaceChildren(
      el("dt", {}, state.layer === null ? `Launches ${OUTSIDE}` : `Launches in layer ${state.layer}`),
      el("dd", {}, compared, el("b", {}, String(after)), compared.length ? [" ", name(`change ${tone}`, change(before, after))] : []),
    );
  }

  function drawTabs() {
    const kinds = [...new Set(labels.values())];
    const current = labels.get(state.layer);
    const tabs = $(".tabs");
    renew(tabs, kinds.map((kind) => {
      const members = layers.filter((layer) => labels.get(layer) === kind);
      const attributes = { role: "tab", "data-layer-kind": kind, "aria-selected": String(kind === current), "aria-controls": "stage" };
      const count = kind === OUTSIDE ? null : el("small", {}, plural(members.length, "layer"));
      return button({ ...attributes, onclick: () => show(members[0]) }, kind, count);
    }));
    roving(tabs, tabs.querySelector("[aria-selected=true]"));

    const members = layers.filter((layer) => labels.get(layer) === current);
    const place = members.indexOf(state.layer);
    const step = (name, sign, to) =>
      button({ "aria-label": `${name} layer of this kind`, disabled: to === undefined, onclick: () => show(to) }, sign);
    const pick = el("select", { "aria-label": "Layer", onchange: (event) => show(members[event.target.selectedIndex]) },
      members.map((layer) => el("option", {}, layer === null ? OUTSIDE : `Layer ${layer}`)));
    pick.selectedIndex = place;
    renew($(".stepper"), [step("Previous", "‹", members[place - 1]), pick, step("Next", "›", members[place + 1])]);
  }

  function drawSegments(container, names, key, then) {
    const choose = (name) => {
      state[key] = name;
      drawSegments(container, names, key, then);
      then();
    };
    renew(container, names.map((name) =>
      button({ "data-measure": name, "aria-pressed": String(state[key] === name), onclick: () => choose(name) }, MEASURES[name].label)));
  }

  // Pixels for one unit, the same for all rows: the longest row fills the room, unless that squeezes what is to scale.
  function scaleFor(rows, room) {
    const drawn = (scale) => Math.max(...rows.map((row) => sum(row, (value) => Math.max(LEAST, value * scale) + GAP)));
    const exact = room / (Math.max(...rows.map((row) => sum(row, (value) => value))) || 1);
    let [low, high] = [0, exact];
    for (let i = 0; i < 40; i++) {
      const middle = (low + high) / 2;
      if (drawn(middle) <= room) low = middle;
      else high = middle;
    }
    return Math.max(low, 0.4 * exact);
  }

  function drawBlock(kernel, width) {
    const letters = (width - 12) / LETTER;
    const flat = letters >= Math.min(kernel.short.length, 14);
    const amount = state.measure === "bytes" || !timed ? size(kernel.bytes) : time(kernel.microseconds);
    // Cut short, a name is still a name, but a number is another number.
    const content = (flat || width >= 15 ? [kernel.short] : []).concat(flat && letters >= amount.length ? [amount] : []);
    const block = button({
      class: `block${flat || width < 15 ? "" : " upright"}`,
      "data-kernel": kernel.id,
      "data-kind": kernel.kind,
      "aria-label": `${kernel.short}, ${data.kinds[kernel.kind]}, ${timed ? `${time(kernel.microseconds)}, ` : ""}${size(kernel.bytes)}`,
      "aria-pressed": "false",
      onclick: () => select(kernel),
      onpointerenter: () => point(kernel, true),
      onpointerleave: () => point(null, false),
      onfocus: () => point(kernel, false),
      onblur: () => point(null, false),
    }, content.map((words) => el("span", {}, words)));
    block.style.width = `${width}px`;
    return block;
  }

  function drawStage() {
    const stage = $(".stage");
    const track = el("div", { class: "track" });
    stage.replaceChildren(track);
    const measure = MEASURES[state.measure];
    const rows = variants.map((variant) => ofLayer(variant, state.layer));
    const amounts = rows.map((row) => row.map(measure.of));
    const longest = Math.max(...rows.map((row) => row.length));
    const scale = scaleFor(amounts, Math.max(stage.clientWidth - 10, Math.min(640, 24 * longest)));
    const widths = amounts.map((row) => row.map((value) => Math.max(LEAST, value * scale)));
    const drawn = widths.map((row) => sum(row, (width) => width + GAP));
    variants.forEach((variant, i) => {
      const attributes = { role: "group", "data-variant": variant.name, "aria-label": `Kernels of ${variant.title}` };
      const row = el("div", { class: `row${i ? " last" : ""}`, ...attributes },
        rows[i].map((kernel, j) => drawBlock(kernel, widths[i][j])));
      if (i && drawn[0] - drawn[1] > 12) row.append(savedBox(amounts, measure, drawn[0] - drawn[1] - GAP));
      const totals = [plural(rows[i].length, "kernel"), launches(rows[i]), totalTime(rows[i]), size(sum(rows[i], MEASURES.bytes.of))];
      const head = el("p", { class: "row-head" }, el("b", {}, variant.title), el("span", {}, totals.filter(Boolean).join(" · ")));
      track.append(...(i ? [el("svg", { class: "links", "aria-hidden": "true" }), row, head] : [head, row]));
    });
    drawScale(measure, scale, amounts.flat());
    mark();
    roveRows();
  }

  function savedBox(amounts, measure, width) {
    const [before, after] = amounts.map((row) => sum(row, (value) => value));
    const box = el("span", { class: "saved" });
    box.style.width = `${width}px`;
    const words = measure === MEASURES.equal ? `${before - after} fewer` : `${measure.show(before - after)} less`;
    // With few pixels or none to scale the rest of the row would only seem to be a saving.
    if (after >= before) box.style.visibility = "hidden";
    else if (width > words.length * 7.5) box.append(words);
    return box;
  }

  function drawScale(measure, scale, amounts) {
    const widened = amounts.filter((value) => value * scale < LEAST).length;
    const note = widened ? ` · ${widened} of ${amounts.length} blocks are drawn wider than to scale, so that they can be clicked` : "";
    if (!measure.units || !scale) return $("#scale").replaceChildren(`all blocks have one width${note}`);
    const target = 90 / scale;
    const power = 10 ** Math.floor(Math.log10(target));
    const step = power * [5, 2, 1].find((factor) => target / power >= factor);
    const rule = el("i");
    rule.style.width = `${step * scale}px`;
    $("#scale").replaceChildren(rule, scaled(step, measure.units).replace(/\.0+(?=\D)/, ""), note);
  }

  function point(kernel, dim) {
    state.pointed = kernel?.id ?? null;
    $(".stage").classList.toggle("pointing", dim);
    mark();
  }

  // Which blocks are selected, which do the same work as the one pointed at or selected, and the bands between them.
  function mark() {
    const selected = byId.get(state.kernel);
    const source = byId.get(state.pointed) ?? selected;
    const others = new Set(source ? related(source) : []);
    let from = null;
    const found = [];
    for (const block of document.querySelectorAll(".block")) {
      const kernel = byId.get(block.dataset.kernel);
      block.setAttribute("aria-pressed", String(kernel === selected));
      block.classList.toggle("source", kernel === source);
      block.classList.toggle("related", others.has(kernel));
      if (kernel === source) from = block;
      if (others.has(kernel)) found.push(block);
    }
    $(".links")?.replaceChildren(...found.map((to) => {
      const [upper, lower] = from.closest(".row.last") ? [to, from] : [from, to];
      const [left, right] = [upper, lower].map((block) => block.offsetLeft);
      const corners = [[left, 0], [left + upper.offsetWidth, 0], [right + lower.offsetWidth, 44], [right, 44]];
      return el("polygon", { "data-kind": from.dataset.kind, points: corners.map(([x, y]) => `${x - LEFT},${y}`).join(" ") });
    }));
    const facts = source && [
      source.short, source.module, timed ? time(source.microseconds) : "", size(source.bytes),
      variants.length > 1 ? `shares work with ${plural(others.size, "kernel")} of the other graph` : "",
    ];
    $("#readout").textContent = facts ? facts.filter(Boolean).join(" · ") : "";
  }

  function roveRows() {
    for (const row of document.querySelectorAll(".row")) {
      // Up and down lead to the other half of the work, where it has one in this layer.
      const other = [...document.querySelectorAll(".row")].find((candidate) => candidate !== row);
      roving(row, row.querySelector("[aria-pressed=true]") ?? row.querySelector(".related"),
        () => other?.querySelector(".related") ?? other?.querySelector(".block"));
    }
  }

  function select(kernel) {
    if (kernel.layer !== state.layer) return show(kernel.layer, kernel);
    state.kernel = kernel.id;
    remember();
    mark();
    roveRows();
    drawDetail();
  }

  function go(kernel) {
    select(kernel);
    document.querySelector(".block[aria-pressed=true]").focus();
  }

  function drawLegend() {
    const rows = variants.map((variant) => ofLayer(variant, state.layer));
    const items = [];
    for (const [kind, label] of Object.entries(data.kinds)) {
      const groups = rows.map((row) => row.filter((kernel) => kernel.kind === kind));
      if (!groups.some((group) => group.length)) continue;
      const counts = groups.map((group, i) => (i < groups.length - 1 ? group.length : plural(group.length, "kernel"))).join(" → ");
      const amounts = groups.map((group) => totalTime(group) ?? size(sum(group, MEASURES.bytes.of))).join(" → ");
      items.push(el("li", {}, swatch(kind), el("span", {}, label), el("small", {}, `${counts}, ${amounts}`)));
    }
    $(".legend").replaceChildren(...items);
  }

  function valuesTable(title, rows) {
    if (!rows.length) return [el("h3", {}, title), el("p", { class: "quiet" }, "none")];
    const row = (tag, name, shape, dtype, bytes) =>
      el("tr", {}, el(tag, {}, name), el(tag, {}, shape), el(tag, {}, dtype), el(tag, { class: "n" }, bytes));
    const cells = (value) => [broken(value.name), value.shape.join(" × ") || "scalar", value.dtype, size(value.bytes)];
    const body = el("tbody", {}, rows.map((value) => row("td", ...cells(value))));
    const head = el("thead", {}, row("th", "Name", "Shape", "Type", "Bytes"));
    return [el("h3", {}, title), el("div", { class: "table" }, el("table", { class: "values" }, head, body))];
  }

  // The model's lines under the module that they ran in; a module called twice in a row is named once.
  function sourceLines(kernel) {
    const parts = [];
    let place = null;
    for (const line of kernel.lines) {
      if (place !== `${line.module} ${line.file}`) {
        place = `${line.module} ${line.file}`;
        parts.push(el("p", { class: "place" }, el("b", {}, broken(line.module || "the model itself")), el("br"), line.file));
      }
      parts.push(el("div", { class: "hf-line" }, el("span", {}, String(line.line)), el("code", {}, line.code)));
    }
    return parts.length ? parts : [el("p", { class: "quiet" }, "No line of the model: Inductor or the compiled graph added it.")];
  }

  function sameWork(kernel) {
    if (variants.length < 2) return [];
    const others = related(kernel);
    const title = variants.find((variant) => variant !== kernel.variant).title;
    const elsewhere = (other) => (other.layer === kernel.layer ? "" : `, ${layerName(other.layer)}`);
    return [
      el("h3", {}, `In ${title}, this work is done by`),
      others.length ? el("div", { class: "same" }, others.map((other) => button({ "data-same": other.id, onclick: () => go(other) },
        swatch(other.kind), `${other.short}${timed ? `, ${time(other.microseconds)}` : ""}${elsewhere(other)}`)))
        : el("p", { class: "quiet" }, "No kernel there computes any node of the graph that this one computes."),
    ];
  }

  function drawDetail() {
    const detail = $("#detail");
    const kernel = byId.get(state.kernel);
    if (!kernel) {
      detail.removeAttribute("data-kind");
      detail.replaceChildren(el("p", { class: "quiet" }, "Nothing runs here."));
      return;
    }
    detail.dataset.kind = kernel.kind;
    const ops = new Map();
    for (const op of kernel.ops) ops.set(op, (ops.get(op) ?? 0) + 1);
    const facts = [
      timed ? ["Time", time(kernel.microseconds)] : null,
      ["Bytes", size(kernel.bytes)],
      // bytes / µs is MB/s
      kernel.microseconds ? ["Bandwidth", `${scaled(kernel.bytes / kernel.microseconds, ["MB", "GB", "TB"])}/s`] : null,
      ["Launches", String(kernel.launches)],
    ].filter(Boolean);
    const list = (items) => items.map((item) => el("code", {}, item));
    detail.replaceChildren(
      el("header", {},
        el("h2", {}, broken(kernel.name)),
        el("p", { class: "what" },
          el("span", {}, swatch(kernel.kind), data.kinds[kernel.kind]),
          kernel.fusion ? el("span", {}, "fusion", el("code", {}, kernel.fusion)) : null,
          el("span", {}, `${kernel.variant.title}, call ${kernel.index}, ${layerName(kernel.layer)}`)),
      ),
      el("div", {},
        el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
        el("h3", {}, "Module"), el("code", {}, broken(kernel.module || "none: outside the modules")),
        sameWork(kernel),
        valuesTable("Inputs", kernel.inputs),
        valuesTable("Outputs", kernel.outputs),
        el("h3", {}, "Ops"),
        el("div", { class: "chips" }, list([...ops].map(([op, count]) => (count > 1 ? `${op} ×${count}` : op)))),
        el("details", {}, el("summary", {}, plural(kernel.nodes.length, "node"), " of Dynamo’s graph"), el("div", { class: "chips" }, list(kernel.nodes)))),
      el("div", {},
        el("h3", {}, "Lines of Hugging Face’s model"),
        el("div", { class: "source" }, sourceLines(kernel)),
        el("h3", {}, "Code"),
        el("pre", { tabindex: "0", role: "region", "aria-label": "Code of the kernel" }, el("code", {}, kernel.code))),
    );
  }

  // Of each layer, variant and kind: time, bytes and launches. The whole model's, summed once.
  const totals = new Map(layers.map((layer) => [layer, variants.map((variant) => {
    const kinds = new Map();
    for (const kernel of ofLayer(variant, layer)) {
      const entry = kinds.get(kernel.kind) ?? { time: 0, bytes: 0, count: 0 };
      for (const key of Object.keys(entry)) entry[key] += MEASURES[key].of(kernel);
      kinds.set(kernel.kind, entry);
    }
    return kinds;
  })]));

  function drawOverview() {
    const key = state.overview;
    const amount = (kinds) => sum([...kinds.values()], (entry) => entry[key]);
    const most = Math.max(...layers.filter((layer) => layer !== null).flatMap((layer) => totals.get(layer).map(amount)), 0)
      || Math.max(...[...totals.values()].flat().map(amount), 1);
    const strip = $(".overview");
    const scrolled = strip.scrollLeft;
    renew(strip, layers.map((layer) => {
      const described = totals.get(layer).map((kinds, i) => `${variants[i].title} ${MEASURES[key].show(amount(kinds))}`).join(", ");
      const bars = totals.get(layer).map((kinds) => {
        const total = amount(kinds);
        const height = (150 * Math.min(1, total / most)) / (total || 1);
        const stack = el("span", { class: `stack${total > most ? " cut" : ""}` });
        for (const kind of Object.keys(data.kinds).filter((name) => kinds.has(name)).reverse()) {
          const part = el("i", { "data-kind": kind });
          part.style.height = `${kinds.get(kind)[key] * height}px`;
          stack.append(part);
        }
        return stack;
      });
      const kin = labels.get(layer) === labels.get(state.layer);
      const name = `${layer === null ? OUTSIDE : `Layer ${layer}, ${labels.get(layer)}`}: ${described}`;
      return button({
        class: `column${layer === null ? " rest" : kin ? " kin" : ""}`, "data-layer": layer ?? "outside",
        "aria-pressed": String(layer === state.layer), "aria-label": name, title: name,
        onclick: () => {
          show(layer);
          $("#layer").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
        },
      }, el("span", { class: "bars" }, bars), layer === null ? "outside" : String(layer));
    }));
    strip.scrollLeft = scrolled;
    roving(strip, strip.querySelector("[aria-pressed=true]"));
    const rest = totals.has(null) ? totals.get(null).map(amount) : [];
    const cut = Math.max(0, ...rest) > most ? ` “Outside” is cut off there: it is ${rest.map(MEASURES[key].show).join(" → ")}.` : "";
    $("#overview-scale").textContent = `The tallest column is ${MEASURES[key].show(most)}.${cut}`;
  }

  function remember() {
    history.replaceState(null, "", `#${new URLSearchParams({ layer: state.layer ?? "outside", kernel: state.kernel ?? "" })}`);
  }

  function fromHash() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const kernel = byId.get(wanted.get("kernel"));
    const layer = layers.find((index) => String(index ?? "outside") === wanted.get("layer"));
    if (kernel) show(kernel.layer, kernel);
    else show(layer === undefined ? layers[0] ?? null : layer);
  }

  function themes() {
    const root = document.documentElement;
    const toggle = $("#theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const current = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
    const other = () => (current() === "dark" ? "light" : "dark");
    const name = () => { toggle.textContent = other() === "dark" ? "Dark theme" : "Light theme"; };
    toggle.addEventListener("click", () => {
      root.dataset.theme = other();
      name();
    });
    system.addEventListener("change", name);
    name();
  }

  themes();
  drawSegments($("#measure"), timed ? ["time", "bytes", "equal"] : ["bytes", "equal"], "measure", drawStage);
  drawSegments($("#overview-measure"), timed ? ["time", "bytes", "count"] : ["bytes", "count"], "overview", drawOverview);
  fromHash();
  window.addEventListener("hashchange", fromHash);
  let width = $(".stage").clientWidth;
  new ResizeObserver(() => {
    if (width === $(".stage").clientWidth) return; // only the height changed: drawing again would take the focus away
    width = $(".stage").clientWidth;
    drawStage();
  }).observe($(".stage"));
})();
