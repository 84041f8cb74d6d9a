"use strict";
// Draws the page from the JSON block. Text from files and data is set as text alone (textContent), never as markup.

const content = JSON.parse(document.getElementById("content").textContent);
const survey = content.survey;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const SHAPES = ["circle", "square", "triangle", "diamond", "circle"];
const byId = (id) => document.getElementById(id);
const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(1));
const number = (x) => Number(x.toPrecision(3)).toString();

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

// --- charts ------------------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function marker(shape, x, y, r) {
  const d = {
    circle: `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
    square: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
    triangle: `M${x} ${y - 1.2 * r}l${1.2 * r} ${2.1 * r}h${-2.4 * r}Z`,
    diamond: `M${x} ${y - 1.3 * r}l${1.3 * r} ${1.3 * r}l${-1.3 * r} ${1.3 * r}l${-1.3 * r} ${-1.3 * r}Z`,
  }[shape];
  return element("path", { d });
}

/** A chart of series {name, points: [{x, y, told}]}; `now` is an x to mark. It is drawn at the width of its place. */
function drawChart(place, { xLabel, yLabel, series, now }) {
  const points = series.flatMap((s) => s.points);
  const width = Math.max(280, place.clientWidth || 480), height = 300;
  const edge = { left: 46, right: 12, top: 10, bottom: 40 };
  const range = (values) => {
    const low = Math.min(...values), high = Math.max(...values), spare = 0.06 * (high - low || Math.abs(high) || 1);
    return [low - spare, high + spare];
  };
  const [x0, x1] = range(points.map((p) => p.x)), [y0, y1] = range(points.map((p) => p.y));
  const toX = (x) => edge.left + ((x - x0) / (x1 - x0)) * (width - edge.left - edge.right);
  const toY = (y) => height - edge.bottom - ((y - y0) / (y1 - y0)) * (height - edge.top - edge.bottom);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${yLabel} against ${xLabel}` });
  for (const x of ticks(x0, x1, Math.max(3, width / 90))) {
    svg.append(element("line", { class: "grid", x1: toX(x), x2: toX(x), y1: edge.top, y2: height - edge.bottom }));
    svg.append(element("text", { x: toX(x), y: height - edge.bottom + 16, "text-anchor": "middle" }, number(x)));
  }
  for (const y of ticks(y0, y1, 5)) {
    svg.append(element("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: toY(y), y2: toY(y) }));
    svg.append(element("text", { x: edge.left - 6, y: toY(y) + 4, "text-anchor": "end" }, number(y)));
  }
  svg.append(element("text", { x: (width + edge.left) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
  svg.append(element("text", { x: -(height - edge.bottom) / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, yLabel));
  if (now !== undefined) svg.append(element("line", { class: "now", x1: toX(now), x2: toX(now), y1: edge.top, y2: height - edge.bottom }));
  const legend = element("ul", { class: "legend" });
  series.forEach((s, i) => {
    const colour = `var(--series-${i % 5})`, shape = SHAPES[i % 5];
    const line = s.points.map((p, j) => `${j ? "L" : "M"}${toX(p.x)} ${toY(p.y)}`).join("");
    const group = element("g", { style: `fill:${colour};stroke:${colour}` });
    if (s.points.length > 1) group.append(element("path", { d: line, style: "fill:none", "stroke-width": 1.5 }));
    for (const p of s.points) {
      const mark = marker(shape, toX(p.x), toY(p.y), 4);
      mark.append(element("title", {}, `${s.name}: ${p.told}`));
      group.append(mark);
    }
    svg.append(group);
    const key = element("svg", { viewBox: "0 0 16 12", style: `fill:${colour}`, "aria-hidden": "true" }, marker(shape, 8, 6, 4));
    legend.append(element("li", {}, key, s.name));
  });
  place.replaceChildren(svg, legend);
}

const isError = content.metric === "wer";
const metricName = isError ? "word error rate, %" : "top-1, %";
const metric = (row) => row[content.metric];
const comparison = content.comparison && content.comparison.rows && content.comparison.rows.length ? content.comparison : null;

/** Model -> its rows, all of one set of samples: those of the comparison, else those saved with the model. */
function measured() {
  const saved = content.results.map((row) => ({ ...row, model: "adaptive" }));
  const dense = content.dense ? [{ ...content.dense, model: "dense", macs_ratio: 1 }] : [];
  const rows = (comparison ? comparison.rows : [...saved, ...dense]).filter((row) => metric(row) !== null && metric(row) !== undefined);
  const names = new Set(["adaptive", "dense", ...rows.map((row) => row.model)]);
  return [...names].map((name) => [name, rows.filter((row) => row.model === name)]).filter(([, found]) => found.length);
}

const point = (x, row, unit) => ({ x, y: 100 * metric(row), told: `${percent(metric(row))} % at ${number(x)} ${unit}` });
const byX = (points) => points.sort((a, b) => a.x - b.x);

function macsSeries() {
  return measured().map(([name, rows]) => ({ name, points: byX(rows.map((row) => point(row.macs_ratio, row, "of the MACs"))) }));
}

const batch = comparison ? Math.max(0, ...comparison.rows.flatMap((row) => row.latency.map((time) => time.batch_size))) : 0;

function timeSeries() {
  if (!batch) return ownTimes();
  const each = (row) => row.latency.find((time) => time.batch_size === batch).p50 / batch;
  return measured().map(([name, rows]) => ({ name, points: byX(rows.map((row) => point(each(row), row, "ms"))) }));
}

/** Milliseconds that were saved with the model itself, where nothing was compared. */
function ownTimes() {
  const table = content.latency ? content.latency.table.map((t) => [t.budget, t.latency_ms.p50 / content.latency.batch_size]) : [];
  const times = new Map([...content.results.filter((r) => r.latency_ms).map((r) => [r.budget, r.latency_ms]), ...table]);
  const rows = content.results.filter((r) => times.has(r.budget) && metric(r) !== null);
  const found = rows.length ? [{ name: "adaptive", points: byX(rows.map((r) => point(times.get(r.budget), r, "ms"))) }] : [];
  if (found.length && content.dense.latency_ms) found.push({ name: "dense", points: [point(content.dense.latency_ms, content.dense, "ms")] });
  return found;
}

function charts(now) {
  const byMacs = macsSeries(), byTime = timeSeries();
  byId("frontier").hidden = !byMacs.length;
  byId("time-figure").hidden = !byTime.length;
  const yLabel = metricName;
  if (byMacs.length) drawChart(byId("macs-chart"), { xLabel: "executed MACs, share of the dense model's", yLabel, series: byMacs, now });
  if (byTime.length) drawChart(byId("time-chart"), { xLabel: `milliseconds an image${batch ? `, batches of ${batch}` : ""}, median`, yLabel, series: byTime });
}

function numbers() {
  const head = ["model", "budget", "MACs", metricName, "agreement, %"];
  const rows = [["dense", "–", "1.000", percent(content.dense && metric(content.dense)), "100.0"]];
  for (const r of content.results) rows.push(["adaptive", number(r.budget), r.macs_ratio.toFixed(3), percent(metric(r)), percent(r.agreement)]);
  for (const r of comparison ? comparison.rows : [])
    rows.push([`compared: ${r.model}`, r.budget ? number(r.budget) : "–", r.macs_ratio.toFixed(3), percent(metric(r)), percent(r.agreement)]);
  const cells = (name, row) => element("tr", {}, ...row.map((x, i) => element(i ? name : "th", {}, x)));
  byId("numbers").replaceChildren(element("thead", {}, cells("th", head)), element("tbody", {}, ...rows.map((r) => cells("td", r))));
}

// --- sites -------------------------------------------------------------------------------------------------------

const kinds = [...new Set(content.sites.map((s) => s.kind))];
const columns = [...new Set(content.sites.map((s) => s.column))].sort((a, b) => a - b);
const cellOf = new Map();

function layOutSites() {
  const head = element("tr", {}, element("th", {}, ""), ...columns.map((c) => element("th", { scope: "col" }, c)));
  const rows = kinds.map((kind) => {
    const row = element("tr", {}, element("th", { scope: "row" }, kind));
    for (const column of columns) {
      const cell = element("td"), site = content.sites.findIndex((s) => s.kind === kind && s.column === column);
      if (site >= 0) cellOf.set(site, cell);
      row.append(cell);
    }
    return row;
  });
  byId("site-map").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  if (!survey) return;
  byId("histograms").replaceChildren(...content.sites.map((site) => element("figure", {}, element("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img" }), element("figcaption", {}, site.name))));
}

function showSites(level) {
  content.sites.forEach((site, i) => {
    const share = level.shares[i], cell = cellOf.get(i);
    if (share === undefined) return;
    cell.textContent = share.toFixed(2);
    cell.title = `${site.name}: ${percent(share)} % of ${site.learners} learners; ${percent(site.share)} % of the dense MACs`;
    cell.style.background = `color-mix(in srgb, var(--accent) ${Math.round(100 * share)}%, var(--panel))`;
    cell.style.color = share > 0.55 ? "var(--on-accent)" : "var(--text)";
  });
  if (!level.histograms) return;
  [...byId("histograms").children].forEach((figure, i) => {
    const counts = level.histograms[i], total = counts.reduce((a, b) => a + b, 0) || 1, width = 100 / counts.length;
    const bars = counts.map((count, k) => {
      const height = (40 * count) / total;
      return element("rect", { x: k * width + 1, width: width - 2, y: 40 - height, height });
    });
    figure.firstChild.setAttribute("aria-label", `${content.sites[i].name}: ${counts.map((c, k) => `${k}: ${percent(c / total)} %`).join(", ")}`);
    figure.firstChild.replaceChildren(...bars);
  });
}

// --- images ------------------------------------------------------------------------------------------------------

const figures = []; // {picture, canvas, caption, isFailure}

function layOutPictures() {
  for (const group of ["examples", "dearest", "cheapest", "failures"]) {
    const used = group === "failures" ? [...new Set(survey.levels.flatMap((l) => l.failures))] : survey[group];
    byId(group).replaceChildren(...used.map((index) => {
      const picture = survey.pictures[index], caption = element("figcaption");
      const image = element("img", { src: picture.source, alt: picture.label || "an image of the data" });
      image.addEventListener("load", () => image.classList.toggle("large", image.naturalWidth > 64));
      const canvas = element("canvas", { "aria-hidden": "true" });
      const figure = element("figure", {}, element("div", { class: "stack" }, image, canvas), caption);
      figures.push({ picture, canvas, caption, figure, index, isFailure: group === "failures" });
      return figure;
    }));
  }
}

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[i].map((from, c) => Math.round(from + (at - i) * (RAMP[i + 1][c] - from)));
}

function paint(canvas, letters, toShare) {
  const [rows, cols] = survey.grid;
  canvas.width = cols;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(cols, rows);
  [...letters].forEach((letter, i) => image.data.set([...colour(toShare(LETTERS.indexOf(letter))), 150], 4 * i));
  context.putImageData(image, 0, 0);
}

function showPictures(stop, level) {
  const overlay = document.querySelector("input[name=overlay]:checked").value;
  const share = overlay === "sizes" ? (v) => Math.log2(Math.max(v, 1)) / 6 : (v) => v / 63;
  for (const { picture, canvas, caption, figure, index, isFailure } of figures) {
    const letters = overlay === "none" || !survey.grid ? undefined : picture[overlay][stop];
    canvas.hidden = letters === undefined;
    if (letters !== undefined) paint(canvas, letters, share);
    figure.hidden = isFailure && !level.failures.includes(index);
    const said = isFailure ? `${picture.label}, taken for ${picture.guess[stop]}` : picture.label || picture.guess[stop];
    caption.textContent = `${said}; ${percent(picture.cost[stop])} % of the dense MACs`;
  }
  byId("scale-low").textContent = overlay === "sizes" ? "1 patch" : "0 %";
  byId("scale-high").textContent = overlay === "sizes" ? "64 patches or more" : "100 %";
  document.querySelector(".scale").hidden = overlay === "none";
  byId("scale-note").textContent = {
    maps: "MACs of the adaptive sites spent on each patch, as a share of what the dense model spends there.",
    sizes: "Patches that have become one token behind the last block, on a logarithmic scale.",
    none: "",
  }[overlay];
  const hidden = level.lost - level.failures.length, more = hidden > 0 ? ` (${hidden} of them not shown)` : "";
  byId("failures-note").textContent = `Of ${survey.samples} images, ${level.lost} that the dense model has right are wrong at this budget${more}; ${level.gained} that it has wrong are right.`;
}

// --- recordings --------------------------------------------------------------------------------------------------

const heard = survey && survey.recordings;
const tracks = []; // {recording, canvas, caption}

function layOutRecordings() {
  byId("recordings").replaceChildren(...heard.map((recording) => {
    const canvas = element("canvas", { class: "wave", role: "img", width: recording.wave.length, height: 64 });
    const caption = element("figcaption");
    tracks.push({ recording, canvas, caption });
    return element("figure", {}, canvas, caption);
  }));
}

function showRecordings(stop, level) {
  for (const { recording, canvas, caption } of tracks) {
    const { wave } = recording, frames = recording.frames[stop], context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    [...wave].forEach((letter, i) => {
      const share = LETTERS.indexOf(frames[Math.floor((i * frames.length) / wave.length)]) / 63;
      const height = Math.max(1, (LETTERS.indexOf(letter) / 63) * canvas.height);
      context.fillStyle = `rgb(${colour(share).join(" ")})`;
      context.fillRect(i, (canvas.height - height) / 2, 1, height);
    });
    const cost = `${recording.seconds} s, ${percent(recording.cost[stop])} % of the dense MACs`;
    canvas.setAttribute("aria-label", cost);
    const said = recording.guess[stop], changed = said !== recording.dense ? `; dense: “${recording.dense}”` : "";
    caption.textContent = `${cost}${said ? `: “${said}”${changed}` : ""}`;
  }
  byId("heard-note").textContent = `Of ${survey.samples} recordings, ${level.lost} are written differently from the dense model at this budget.`;
}

// --- the slider --------------------------------------------------------------------------------------------------

/** What the page shows at each stop of the slider: as surveyed, or what was saved with the model. */
function levels() {
  const mean = (counts) => counts.reduce((a, c, k) => a + c * k, 0) / ((counts.length - 1) * counts.reduce((a, c) => a + c, 0) || 1);
  if (survey) return survey.levels.map((level) => ({ ...level, shares: level.histograms.map(mean) }));
  return content.results.map((row) => ({ ...row, shares: content.sites.map((s) => (row.sites || {})[s.name]) }));
}

const stops = levels();

function show(stop) {
  const level = stops[stop], slider = byId("budget");
  byId("budget-value").textContent = number(level.budget);
  const where = survey ? `these ${survey.samples} ${heard ? "recordings" : "images"}` : `${content.samples} samples`;
  const told = `${percent(level.macs_ratio)} % of the dense MACs, ${metricName.split(",")[0]} ${percent(metric(level))} %, agreement with dense ${percent(level.agreement)} % on ${where}`;
  byId("budget-note").textContent = told;
  slider.setAttribute("aria-valuetext", `budget ${number(level.budget)}: ${told}`);
  charts(level.macs_ratio);
  showSites(level);
  if (heard) showRecordings(stop, level);
  else if (survey) showPictures(stop, level);
}

function start() {
  const macs = `${(content.macs_dense / 1e9).toFixed(3)} G multiply-adds dense`;
  byId("summary").textContent = `${macs}; adaptive sites: ${content.sites.length}; places left dense: ${content.refused}; acmize ${content.acmize}.`;
  const of = comparison ?? content;
  byId("macs-note").textContent = content.dense || comparison ? `${of.samples} ${of.split || "test"} samples${comparison ? "" : ` of ${content.data}`}.` : "";
  byId("time-note").textContent = comparison ? `${comparison.device}, ${comparison.threads} threads, ${comparison.dtype}; the same samples.` : "";
  byId("losses").replaceChildren(...((content.comparison && content.comparison.verdicts) || []).map((line) => element("li", {}, line)));
  byId("findings-part").hidden = !content.findings.length;
  byId("findings-count").textContent = content.findings.length;
  byId("findings").replaceChildren(...content.findings.map((line) => element("li", {}, line)));
  byId("recipe").textContent = JSON.stringify(content.recipe, null, 2);
  byId("environment-part").hidden = !content.environment;
  byId("environment").textContent = JSON.stringify(content.environment, null, 2);
  numbers();
  layOutSites();
  byId("histograms-part").hidden = !survey;
  byId("heard").hidden = !heard;
  for (const id of ["inputs", "failures-part"]) byId(id).hidden = !survey || Boolean(heard);
  if (heard) layOutRecordings();
  else if (survey) {
    layOutPictures();
    byId("overlays").hidden = !survey.grid;
    byId("sizes-choice").hidden = !survey.pictures.some((p) => p.sizes && p.sizes.length);
    byId("failures-part").hidden = survey.dense_accuracy === null;
  }
  byId("control").hidden = byId("sites").hidden = !stops.length;
  if (!stops.length) return;
  const slider = byId("budget"), near = (b) => Math.abs(b - (content.budget ?? 0.5));
  slider.max = stops.length - 1;
  slider.value = stops.reduce((best, s, i) => (near(s.budget) < near(stops[best].budget) ? i : best), 0);
  const update = () => show(Number(slider.value));
  slider.addEventListener("input", update);
  for (const radio of document.querySelectorAll("input[name=overlay]")) radio.addEventListener("change", update);
  window.addEventListener("resize", () => charts(stops[Number(slider.value)].macs_ratio));
  update();
}

start();
