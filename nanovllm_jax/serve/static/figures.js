// The engine's live figures, read from /metrics once a second.

const HISTORY = 60; // seconds that the curve shows
const history = [];
const means = {}; // histogram -> the text last shown
let before = null;

/** Reads the figures now and every second from now on. */
export async function watchFigures() {
  try {
    const response = await fetch("/metrics");
    if (!response.ok) throw new Error(response.statusText);
    show(parse(await response.text()), performance.now() / 1000);
    setHealth((await fetch("/health")).ok ? "up" : "down");
  } catch {
    setHealth("down");
  }
  setTimeout(watchFigures, document.hidden ? 5000 : 1000);
}

/** Prometheus' text as name -> sum over labels; buckets of histograms are left out. */
function parse(text) {
  const values = {};
  for (const line of text.split("\n")) {
    const found = /^nanovllm:(\w+)(?:\{.*\})? (\S+)$/.exec(line);
    if (found && !found[1].endsWith("_bucket")) values[found[1]] = (values[found[1]] ?? 0) + Number(found[2]);
  }
  return values;
}

function show(now, time) {
  const set = (name, text) => (document.getElementById(`figure-${name}`).textContent = text);
  const bar = (name, share) => (document.getElementById(`bar-${name}`).value = share);
  set("running", now.num_requests_running);
  set("waiting", now.num_requests_waiting);
  set("cache", percent(now.kv_cache_usage_perc));
  bar("cache", now.kv_cache_usage_perc);
  const hits = now.prefix_cache_queries_total ? now.prefix_cache_hits_total / now.prefix_cache_queries_total : 0;
  set("hits", percent(hits));
  bar("hits", hits);
  if (before) {
    const rate = (now.generation_tokens_total - before.now.generation_tokens_total) / (time - before.time);
    set("rate", rate >= 100 ? Math.round(rate).toLocaleString("en") : rate.toFixed(rate ? 1 : 0));
    history.push(rate);
    if (history.length > HISTORY) history.shift();
    drawCurve();
  }
  set("ttft", mean(now, "time_to_first_token_seconds"));
  set("itl", mean(now, "inter_token_latency_seconds"));
  before = { now, time };
}

/** Mean of a histogram's newest observations: those of the last second that had any. */
function mean(now, name) {
  const last = before?.now ?? { [`${name}_count`]: 0, [`${name}_sum`]: 0 };
  const count = now[`${name}_count`] - last[`${name}_count`];
  if (count) {
    means[name] = duration((now[`${name}_sum`] - last[`${name}_sum`]) / count);
  }
  return means[name] ?? "–";
}

function drawCurve() {
  const top = Math.max(1, ...history);
  const first = HISTORY - history.length;
  const points = history.map((rate, i) => `${first + i + 1},${(31 - (29 * rate) / top).toFixed(2)}`);
  const [area, line] = document.querySelectorAll("#spark path");
  line.setAttribute("d", `M${points.join("L")}`);
  area.setAttribute("d", `M${first + 1},32L${points.join("L")}L${HISTORY},32Z`);
}

function setHealth(state) {
  const health = document.getElementById("health");
  health.dataset.state = state;
  health.textContent = state === "up" ? "running" : "not reachable";
}

/** Seconds as a person reads them: "8.2 ms", "210 ms", "1.35 s". */
export function duration(seconds) {
  return seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.1 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`;
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}
