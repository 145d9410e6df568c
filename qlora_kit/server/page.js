// The playground: asks the server that it came from for its models, and sends one prompt to several of them at once.
// Text of the server and of models is set as text only; nothing is loaded from elsewhere.

const REFRESH_MS = 5000;
const KEY_ITEM = "qlora-kit-api-key";
const FILTER_FROM = 9; // models; fewer are seen at a glance
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

const element = (id) => document.getElementById(id);
const models = new Map(); // name -> model as the server describes it, the base first
const chosen = new Set();
let running = null; // the AbortController of the answers in the making
let refused = false; // the key was not accepted, and none has been given since
let lost = false; // the list of models could not be had the last time

/** A failure in a sentence for people. */
class Fault extends Error {}

function make(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function tell(sentence) {
  element("notice").textContent = sentence;
  element("notice").hidden = !sentence;
}

// --- the server ---

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY_ITEM);
  const headers = { "content-type": "application/json" };
  if (key !== null) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey(key !== null);
  throw new Fault(await sentenceOf(response));
}

async function sentenceOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}, without saying why.`;
  }
}

/** The events of a streamed response, parsed. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Fault("The connection broke before the answer was whole.");
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// --- the key ---

function askForKey(wrong) {
  refused = true;
  const dialog = element("key-dialog");
  element("key-fault").textContent = wrong ? "The server does not accept this key." : "";
  element("key-fault").hidden = !wrong;
  element("change-key").hidden = false;
  if (!dialog.open) dialog.showModal();
}

element("change-key").addEventListener("click", () => askForKey(false));
element("key-form").addEventListener("submit", () => {
  sessionStorage.setItem(KEY_ITEM, element("key").value.trim());
  element("key").value = "";
  refused = false;
  refresh();
});

// --- the models ---

async function refresh() {
  let listed;
  try {
    listed = (await (await ask("v1/models")).json()).data;
  } catch (fault) {
    if (!(fault instanceof Fault)) throw fault;
    lost = true;
    if (!refused) tell(fault.message);
    return;
  }
  if (lost) tell("");
  lost = false;
  const first = models.size === 0;
  const before = [...models.keys()].join("\n");
  models.clear();
  for (const model of listed) models.set(model.id, model);
  if (first) for (const name of [...models.keys()].slice(0, 2)) chosen.add(name);
  for (const name of [...chosen]) if (!models.has(name)) chosen.delete(name);
  if (before !== [...models.keys()].join("\n")) showModels();
}

function showModels() {
  const base = [...models.values()].find((model) => model.parent === null);
  const adapters = models.size - 1;
  element("summary").textContent = `${base.id} with ${adapters} ${adapters === 1 ? "adapter" : "adapters"}: one prompt, answers side by side.`;
  element("filter").hidden = models.size < FILTER_FROM;
  const wanted = element("filter").hidden ? "" : element("filter").value.trim().toLowerCase();
  const rows = [...models.values()].filter((model) => model.id.toLowerCase().includes(wanted)).map(modelRow);
  element("models").replaceChildren(...(rows.length ? rows : [make("p", "No adapter has such a name.", "hint")]));
}

function modelRow(model) {
  const box = make("input");
  box.type = "checkbox";
  box.checked = chosen.has(model.id);
  box.addEventListener("change", () => (box.checked ? chosen.add(model.id) : chosen.delete(model.id)));
  const row = make("label");
  const description = model.card.description ?? (model.card.task ?? "").replaceAll("_", " ");
  row.append(box, make("span", model.id), make("span", description, "hint"));
  return row;
}

/** The adapter's card: label and text of what its contract says. */
function cardOf(model) {
  const card = model.card;
  const scores = Object.entries(card.scores ?? {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${Number(value.toPrecision(4))}`);
  const data = (card.data ?? []).map((file) => `${file.split}: ${file.name}, ${file.rows.toLocaleString("en")} rows`);
  const facts = {
    "task": (card.task ?? "").replaceAll("_", " "),
    "base": card.base,
    "system prompt": card.system_prompt,
    "data": data.join("\n"),
    "measured": scores.join("\n"),
    "size": card.rank === undefined ? "" : `rank ${card.rank}, ${(card.bytes / 1e6).toFixed(1)} MB`,
    "made": card.created === undefined ? "" : `${card.created.slice(0, 10)}, ${card.origin ?? "elsewhere, without a contract"}`,
  };
  const list = make("dl");
  for (const [label, text] of Object.entries(facts)) {
    if (!text) continue;
    const row = make("div");
    row.append(make("dt", label), make("dd", text));
    list.append(row);
  }
  return list;
}

// --- the answers ---

function requestOf(model) {
  const messages = [{ role: "user", content: element("prompt").value }];
  const system = element("system").value;
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    if (element(name).value !== "") body[name] = Number(element(name).value);
  }
  return body;
}

/** The column of one model. */
function columnOf(name) {
  const article = make("article");
  article.dataset.model = name;
  const answer = make("pre", "", "answer running");
  answer.tabIndex = 0;
  answer.setAttribute("aria-label", `Answer of ${name}`);
  const figures = make("p", "waiting", "figures");
  article.append(make("h3", name));
  const model = models.get(name);
  if (model.parent === null) {
    article.append(make("p", model.card.description, "hint"));
  } else {
    const details = make("details");
    details.append(make("summary", model.card.description ?? "about this adapter"), cardOf(model));
    article.append(details);
  }
  article.append(answer, figures);
  return { article, answer, figures };
}

async function answer(name, signal) {
  const column = columnOf(name);
  element("answers").append(column.article);
  const started = performance.now();
  let first = null;
  let finish = null;
  let usage = null;
  try {
    const body = JSON.stringify(requestOf(name));
    const response = await ask("v1/chat/completions", { method: "POST", body, signal });
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Fault(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        if (choice.delta.content) {
          first ??= performance.now();
          column.answer.append(choice.delta.content); // a text node
          column.figures.textContent = `${((first - started) / 1000).toFixed(2)} s to the first token`;
        }
        finish = choice.finish_reason ?? finish;
      }
    }
    if (finish === null) throw new Fault("The connection broke before the answer was whole.");
    column.figures.textContent = figuresOf({ started, first, ended: performance.now(), usage, finish });
  } catch (fault) {
    if (fault.name === "AbortError") column.figures.textContent = "stopped";
    else if (fault instanceof Fault) column.figures.replaceWith(make("p", fault.message, "fault"));
    else throw fault;
  } finally {
    column.answer.classList.remove("running");
  }
}

function figuresOf({ started, first, ended, usage, finish }) {
  const seconds = (ended - started) / 1000;
  const parts = [`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`, `${seconds.toFixed(2)} s`];
  if (first !== null) parts.push(`first after ${((first - started) / 1000).toFixed(2)} s`);
  if (usage.completion_tokens > 1) parts.push(`${(usage.completion_tokens / seconds).toFixed(0)} tokens/s`);
  parts.push(finish === "length" ? "cut at the longest answer" : "ended by itself");
  return parts.join(" \u00b7 ");
}

async function run() {
  if (running !== null) return;
  if (!element("prompt").value.trim()) {
    tell("Write a prompt first.");
    element("prompt").focus();
    return;
  }
  const names = [...models.keys()].filter((name) => chosen.has(name));
  if (names.length === 0) {
    tell("Choose at least one model under \u201cWho answers\u201d.");
    return;
  }
  tell("");
  running = new AbortController();
  element("run").disabled = true;
  element("stop").disabled = false;
  element("status").textContent = `Asking ${names.join(", ")}.`;
  element("answers").replaceChildren();
  const below = element("answers").getBoundingClientRect().top > innerHeight / 2;
  try {
    const answers = names.map((name) => answer(name, running.signal));
    if (below) element("answers").scrollIntoView(); // on a phone they stand under the settings
    await Promise.all(answers);
    const all = `${names.length} ${names.length === 1 ? "answer is" : "answers are"} there.`;
    element("status").textContent = running.signal.aborted ? "Stopped." : all;
  } finally {
    running = null;
    element("run").disabled = false;
    element("stop").disabled = true;
  }
}

element("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
// A field that is wrong must be seen to be corrected.
element("settings").addEventListener("invalid", () => (element("settings").open = true), true);
element("stop").addEventListener("click", () => running?.abort());
element("filter").addEventListener("input", showModels);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    element("controls").requestSubmit();
  } else if (event.key === "Escape" && running !== null) {
    running.abort();
  }
});

refresh();
setInterval(() => {
  if (document.visibilityState === "visible" && !refused && running === null) refresh();
}, REFRESH_MS);
