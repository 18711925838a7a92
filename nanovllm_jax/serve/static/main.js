// The chat: what is typed goes to the server with the whole conversation, and the answer grows as it comes.

import { duration, watchFigures } from "/static/figures.js";
import { chatChunks, headers, ServerError } from "/static/stream.js";

const at = (id) => document.getElementById(id);
let conversation = [];
let running = null; // the AbortController of the answer that grows

at("key").value = sessionStorage.getItem("key") ?? "";
const key = () => at("key").value.trim();

async function showModel() {
  const response = await fetch("/v1/models", { headers: headers(key()) });
  at("key-section").hidden = response.status !== 401 && !key();
  if (response.ok) {
    const [model] = (await response.json()).data;
    at("model").textContent = model.id;
    at("model").title = `${model.id}, up to ${model.max_model_len} tokens`;
  }
}

/** The body of a request: the conversation, and what the controls say; empty ones leave it to the model. */
function requestBody() {
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  const body = { messages };
  for (const input of at("sampling").querySelectorAll("input")) {
    if (input.value !== "") body[input.name] = Number(input.value);
  }
  return body;
}

async function send(text) {
  const turns = conversation; // a new chat takes another list
  turns.push({ role: "user", content: text });
  addMessage("user").text.textContent = text;
  const answer = addMessage("assistant", "streaming");
  running = new AbortController();
  showRunning(true);
  const times = { start: performance.now(), first: null };
  let written = "";
  let usage = null;
  let ending = "";
  try {
    for await (const chunk of chatChunks(requestBody(), key(), running.signal)) {
      usage = chunk.usage ?? usage;
      const content = chunk.choices[0]?.delta.content;
      if (content) {
        times.first ??= performance.now();
        written += content;
        follow(() => answer.text.append(content));
      }
      if (chunk.choices[0]?.finish_reason === "length") ending = "length limit";
    }
  } catch (error) {
    if (error.name === "AbortError") {
      ending = "stopped";
    } else {
      answer.box.classList.add("failed");
      written += written ? "\n\n" : "";
      answer.text.textContent = written + error.message;
      if (error instanceof ServerError && error.status === 401) at("key-section").hidden = false;
    }
  }
  answer.box.classList.remove("streaming");
  if (answer.box.classList.contains("failed")) turns.pop(); // it may be sent again
  else turns.push({ role: "assistant", content: written });
  follow(() => (answer.note.textContent = describe(times, usage, ending)));
  running = null;
  showRunning(false);
}

/** "48 tokens · 512 tok/s · first after 12.0 ms". */
function describe(times, usage, ending) {
  const parts = [];
  if (usage) {
    parts.push(`${usage.completion_tokens} token${usage.completion_tokens === 1 ? "" : "s"}`);
    const seconds = (performance.now() - times.first) / 1000;
    if (times.first && usage.completion_tokens > 1) parts.push(`${Math.round((usage.completion_tokens - 1) / seconds)} tok/s`);
  }
  if (times.first) parts.push(`first after ${duration((times.first - times.start) / 1000)}`);
  if (ending) parts.push(ending);
  return parts.join(" · ");
}

function addMessage(role, ...classes) {
  at("welcome").hidden = true;
  const [box, text, note] = [0, 0, 0].map(() => document.createElement("div"));
  box.className = ["message", role, ...classes].join(" ");
  text.className = "text";
  note.className = "note";
  box.append(text, note);
  at("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return { box, text, note };
}

/** Makes a change and stays at the end of the conversation if that was in view. */
function follow(change) {
  const list = at("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  change();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function showRunning(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  if (!is) at("prompt").focus();
}

function fitPrompt() {
  const prompt = at("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  at("send").disabled = !prompt.value.trim();
}

function submit() {
  const text = at("prompt").value.trim();
  if (!text || running || !at("sampling").reportValidity()) return;
  at("prompt").value = "";
  fitPrompt();
  send(text);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
at("prompt").addEventListener("input", fitPrompt);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  for (const message of document.querySelectorAll(".message")) message.remove();
  at("welcome").hidden = false;
  at("prompt").focus();
});
at("examples").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  at("prompt").value = event.target.textContent;
  submit();
});
at("panel-toggle").addEventListener("click", () => {
  const open = at("panel").classList.toggle("open");
  at("panel-toggle").setAttribute("aria-expanded", open);
  at("panel-toggle").textContent = open ? "Chat" : "Settings";
});
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", key());
  showModel();
});
at("sampling").addEventListener("submit", (event) => event.preventDefault());
for (const slider of document.querySelectorAll(".slider input")) {
  const show = () => (slider.parentElement.querySelector("output").textContent = Number(slider.value).toFixed(2));
  slider.addEventListener("input", show);
  show();
}

showModel();
watchFigures();
