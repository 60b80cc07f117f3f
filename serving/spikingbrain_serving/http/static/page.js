"use strict";
// Chat over /v1/responses. The conversation lives on the server: this page only holds the id of its last state.

const element = (id) => document.getElementById(id);
const conversation = { id: null, tokens: 0, points: [], columns: [], running: null };
const COLUMN = 5;

async function api(path, method = "GET", body = undefined, signal = undefined) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!answer.ok) {
    const text = await answer.text();
    let message = text;
    try { message = JSON.parse(text).error.message; } catch { /* not ours: shown as it is */ }
    throw new Error(message || answer.statusText);
  }
  return answer;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const frames = held.split("\n\n");
    held = frames.pop();
    for (const frame of frames) {
      const data = frame.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

function show(role, text) {
  const message = document.createElement("div");
  message.className = `message ${role}`;
  message.textContent = text;
  element("conversation").append(message);
  message.scrollIntoView({ block: "end" });
  return message;
}

function bytesText(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

function drawRaster() {
  const canvas = element("raster"), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const columns = conversation.columns.slice(-Math.floor((canvas.width - 150) / COLUMN));
  if (!columns.length) {
    context.fillStyle = "#555";
    context.font = "14px sans-serif";
    context.fillText("No spikes yet (a dense model has none).", 12, 24);
    return;
  }
  const names = Object.keys(columns[0]);
  const rows = names.reduce((sum, name) => sum + columns[0][name].length, 0);
  const height = canvas.height / rows;
  let top = 0;
  names.forEach((name, number) => {
    const channels = columns[0][name].length;
    context.fillStyle = number % 2 ? "#f4f6fa" : "#fff";
    context.fillRect(0, top, canvas.width, channels * height);
    context.fillStyle = "#333";
    context.font = `${Math.min(11, channels * height)}px sans-serif`;
    context.fillText(shortName(name), 4, top + Math.min(11, channels * height));
    columns.forEach((column, x) => column[name].forEach((count, channel) => {
      if (!count) return;
      const strength = Math.min(1, 0.35 + Math.abs(count) / 6);
      context.fillStyle = count > 0 ? `rgba(20,80,180,${strength})` : `rgba(200,60,30,${strength})`;
      context.fillRect(150 + x * COLUMN, top + channel * height, COLUMN - 1, Math.max(height, 1));
    }));
    top += channels * height;
  });
  const last = Object.values(columns[columns.length - 1]).flat();
  const silent = last.filter((count) => count === 0).length / last.length;
  element("silent").textContent = `${(100 * silent).toFixed(0)} % of the channels shown are silent; blue: positive, red: negative counts`;
}

function shortName(name) {
  const parts = name.replace("model.layers.", "").replace(".encoders", "").split(".");
  return parts.join(" ");
}

function drawState() {
  const canvas = element("state"), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const points = conversation.points;
  if (!points.length) return;
  const widest = Math.max(points[points.length - 1][0], 64), highest = Math.max(...points.map(([, y]) => y)) * 1.3;
  const place = ([x, y]) => [40 + (canvas.width - 60) * x / widest, canvas.height - 20 - (canvas.height - 30) * y / highest];
  context.strokeStyle = "#2a7de1";
  context.lineWidth = 2;
  context.beginPath();
  points.forEach((point, index) => (index ? context.lineTo(...place(point)) : context.moveTo(...place(point))));
  context.stroke();
  context.fillStyle = "#333";
  context.font = "12px sans-serif";
  context.fillText(bytesText(points[points.length - 1][1]), 44, 14);
  context.fillText(`${points[points.length - 1][0]} tokens`, canvas.width - 100, canvas.height - 5);
}

function measure(event, started, generated) {
  if (event.state_bytes) {
    conversation.points.push([conversation.tokens + generated, event.state_bytes]);
    element("bytes").textContent = bytesText(event.state_bytes);
  }
  for (const column of event.spikes || []) conversation.columns.push(column);
  const seconds = (performance.now() - started) / 1000;
  element("speed").textContent = seconds > 0 && generated > 1 ? ((generated - 1) / seconds).toFixed(1) : "–";
  element("length").textContent = conversation.tokens + generated;
}

async function ask(text) {
  const body = {
    input: text, stream: true, store: true, return_spikes: true, previous_response_id: conversation.id,
    temperature: Number(element("temperature").value), max_output_tokens: Number(element("limit").value),
  };
  show("user", text);
  const reply = show("assistant", "");
  let started = performance.now(), generated = 0;
  const answer = await api("v1/responses", "POST", body, conversation.running.signal);
  for await (const event of events(answer)) {
    if (event.type === "response.output_text.delta") {
      if (!generated) started = performance.now();
      generated += 1;
      reply.textContent += event.delta;
      reply.scrollIntoView({ block: "end" });
      measure(event, started, generated);
      requestAnimationFrame(draw);
    } else if (event.type === "response.failed") {
      throw new Error(event.error.message);
    } else if (event.type === "response.completed" || event.type === "response.incomplete") {
      finish(event.response);
    }
  }
}

function finish(response) {
  conversation.id = response.id;
  conversation.tokens = response.usage.total_tokens;
  element("length").textContent = conversation.tokens;
  element("cached").textContent = response.usage.input_tokens_details.cached_tokens;
  element("bytes").textContent = bytesText(response.usage.state_bytes);
  conversation.points.push([conversation.tokens, response.usage.state_bytes]);
  requestAnimationFrame(draw);
}

function draw() {
  drawRaster();
  drawState();
}

function setRunning(controller) {
  conversation.running = controller;
  element("send").disabled = controller !== null;
  element("stop").disabled = controller === null;
  element("saveButton").disabled = controller !== null || conversation.id === null;
}

function startOver(id = null, tokens = 0, messages = []) {
  Object.assign(conversation, { id, tokens, points: [], columns: [] });
  element("conversation").replaceChildren();
  messages.forEach((message) => show(message.role, message.content));
  element("length").textContent = tokens;
  setRunning(null);
  draw();
}

async function attempt(work) {
  element("error").textContent = "";
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") element("error").textContent = error.message;
  }
}

function button(text, work) {
  const made = document.createElement("button");
  made.textContent = text;
  made.addEventListener("click", () => attempt(work));
  return made;
}

async function listSessions() {
  const { data } = await (await api("v1/sessions")).json();
  const named = data.filter((session) => !session.id.startsWith("resp_"));
  element("sessions").replaceChildren(...named.map((session) => {
    const item = document.createElement("li"), label = document.createElement("span");
    label.textContent = `${session.id} · ${session.num_tokens} tokens · ${bytesText(session.bytes)}`;
    const path = `v1/sessions/${encodeURIComponent(session.id)}`;
    item.append(
      label,
      button("Restore", async () => {
        const restored = await (await api(`${path}/restore`, "POST")).json();
        startOver(restored.id, restored.num_tokens, restored.messages || []);
      }),
      button("Fork", async () => { await api(`${path}/fork`, "POST", {}); await listSessions(); }),
      button("Delete", async () => { await api(path, "DELETE"); await listSessions(); }),
    );
    return item;
  }));
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = element("input").value;
  if (!text || conversation.running) return;
  element("input").value = "";
  setRunning(new AbortController());
  attempt(() => ask(text)).then(() => setRunning(null));
});
element("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); element("form").requestSubmit(); }
});
element("stop").addEventListener("click", () => conversation.running && conversation.running.abort());
element("new").addEventListener("click", () => startOver());
element("save").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    await api(`v1/sessions/${encodeURIComponent(conversation.id)}/fork`, "POST", { id: element("name").value });
    await listSessions();
  });
});
attempt(async () => {
  element("model").textContent = (await (await api("v1/models")).json()).data[0].id;
  await listSessions();
});
draw();
