"use strict";
// What a model writes is put into text nodes only: it can never become part of the page.
const at = (id) => document.getElementById(id);
let facts = {}, turns = [], running = null, following = null;

const colour = (expert) => `hsl(${(expert * 137.508) % 360} 70% ${68 + (expert % 3) * 6}%)`;
const headers = () => {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

// What the field says; nothing where it is empty, which leaves the server's own.
const number = (id) => (Number.isNaN(at(id).valueAsNumber) ? undefined : at(id).valueAsNumber);

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

async function ask(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.status === 401) at("key-row").hidden = false;
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

async function refresh() {
  facts = await (await ask("facts")).json();
  at("name").textContent = facts.name;
  document.title = `${facts.name} · moeforge`;
  at("facts").textContent = [facts.about, `context ${facts.context} tokens`].filter(Boolean).join(" · ");
  at("prompt-name").textContent = facts.chat ? "Message" : "Text to go on with";
  const layers = Object.keys(facts.tokens_per_expert ?? {}).map(Number).sort((a, b) => a - b);
  at("routing").hidden = !facts.show_routing;
  if (layers.length && Number(at("layer").max) !== layers.length - 1) {
    at("layer").max = layers.length - 1;
    at("layer").value = layers.length - 1;
  }
  facts.layers = layers;
  paint();
}

function layerShown() {
  return facts.layers?.[Number(at("layer").value)];
}

function paint() {
  const layer = layerShown();
  if (at("layer-name").textContent !== `${layer ?? ""}`) { // a long text has many spans: only when it changes
    at("layer-name").textContent = layer ?? "";
    for (const span of document.querySelectorAll("span[data-routing]")) tint(span);
  }
  const loads = facts.tokens_per_expert?.[layer] ?? [], most = Math.max(1, ...loads);
  at("loads").replaceChildren(...loads.map((load, expert) => {
    const bar = document.createElement("i");
    bar.style.height = `${(100 * load) / most}%`;
    bar.style.background = colour(expert);
    bar.title = `expert ${expert}: ${load}`;
    return bar;
  }));
}

function tint(span) {
  const expert = JSON.parse(span.dataset.routing)?.[layerShown()]?.[0];
  if (expert === undefined) {
    delete span.dataset.expert;
    span.style.background = "";
  } else {
    span.dataset.expert = expert;
    span.title = `expert ${expert}`;
    span.style.background = colour(expert);
  }
}

// To the end of the text, once a frame: a layout for each token would take longer than the model.
function follow(body) {
  if (following) return;
  following = requestAnimationFrame(() => {
    following = null;
    body.scrollIntoView({ block: "end" });
  });
}

function addTurn(role, text) {
  const item = document.createElement("li"), who = document.createElement("span"), body = document.createElement("div");
  item.className = `${role}${facts.chat ? "" : " plain"}`;
  who.className = "who";
  who.textContent = facts.chat ? (role === "user" ? "you" : "model") : role === "user" ? "text" : "goes on";
  body.className = "text";
  body.textContent = text;
  item.append(who, body);
  at("texts").append(item);
  return body;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function send(event) {
  event?.preventDefault();
  const text = at("prompt").value;
  if (running || (facts.chat && !text.trim())) return;
  complain("");
  const history = turns; // Clear starts another one
  history.push({ role: "user", content: text });
  const asked = addTurn("user", text), body = addTurn("assistant", "");
  at("prompt").value = "";
  const common = { stream: true, temperature: number("temperature"), max_tokens: number("max-tokens") };
  const [path, request] = facts.chat
    ? ["v1/chat/completions", { ...common, messages: history }]
    : ["v1/completions", { ...common, prompt: history.map((turn) => turn.content).join("") }];
  running = new AbortController();
  const loads = facts.show_routing ? setInterval(() => refresh().catch(() => {}), 1000) : null;
  at("stop").disabled = false;
  at("send").disabled = true;
  let written = "", refused = false;
  try {
    const response = await ask(path, { method: "POST", body: JSON.stringify(request), signal: running.signal });
    for await (const chunk of eventsOf(response)) {
      const choice = chunk.choices[0], piece = choice?.delta?.content ?? choice?.text ?? "";
      if (!piece) continue;
      written += piece;
      const span = document.createElement("span");
      span.textContent = piece;
      if (choice.routing) {
        span.dataset.routing = JSON.stringify(choice.routing);
        tint(span);
      }
      body.append(span);
      follow(body);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      complain(error.message);
      refused = !written;
    }
  }
  clearInterval(loads);
  if (refused) { // as if it had not been sent
    history.pop();
    asked.parentElement.remove();
    body.parentElement.remove();
    at("prompt").value ||= text;
  } else {
    history.push({ role: "assistant", content: written });
    if (!written) body.textContent = "(nothing)";
  }
  running = null;
  at("stop").disabled = true;
  at("send").disabled = false;
  at("prompt").focus();
  refresh().catch((error) => complain(error.message));
}

at("form").addEventListener("submit", send);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  at("texts").replaceChildren();
  complain("");
});
at("layer").addEventListener("input", paint);
at("key").addEventListener("change", () => refresh().then(() => complain(""), (error) => complain(error.message)));
refresh().catch((error) => complain(error.message));
