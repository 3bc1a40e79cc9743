// The page: one stream at a time. `Player` shows what comes, `Input` brings a camera's frames, the rest is buttons.

import { Input } from "./input.js";
import { Player } from "./player.js";

const $ = (id) => document.getElementById(id);
const KEEP = 256 * 2 ** 20; // bytes of a recording
const token = new URLSearchParams(location.search).get("token");
let about, socket, player, input, recording, bytes, opened, expected;

function address() {
  const url = new URL("api/stream", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.search = token ? `?token=${encodeURIComponent(token)}` : "";
  return url;
}

const notice = (text) => ($("notice").textContent = text);
const say = (type, what = {}) => socket?.readyState === WebSocket.OPEN && socket.send(JSON.stringify({ type, ...what }));

function asked() {
  const what = { prompt: $("prompt").value, seed: Number($("seed").value) };
  if ($("num_steps").value) what.num_steps = Number($("num_steps").value);
  if ($("guidance_scale").value) what.guidance_scale = Number($("guidance_scale").value);
  if ($("cache_policy").value) what.cache_policy = $("cache_policy").value;
  if (input) Object.assign(what, { video: true, noise_scale: Number($("noise_scale").value) });
  return what;
}

function start() {
  stop();
  [recording, bytes, opened, expected] = [[], 0, null, null];
  notice("connecting …");
  const mine = (socket = new WebSocket(address()));
  const begun = performance.now();
  mine.binaryType = "arraybuffer";
  mine.onopen = () => mine.send(JSON.stringify({ type: "open", more: 2, ...asked() }));
  mine.onmessage = ({ data }) => mine === socket && (typeof data === "string" ? hear(JSON.parse(data), begun) : take(data));
  mine.onclose = () => {
    if (mine !== socket) return;
    socket = null;
    player?.finish();
    if (!$("notice").textContent.startsWith("the stream has ended")) notice("the connection is closed");
  };
}

function stop() {
  const old = socket;
  socket = null;
  old?.close();
  player?.close();
  player = null;
}

function hear(said, begun) {
  switch (said.type) {
    case "waiting":
      return notice(said.place ? `waiting: ${said.place} before you` : "waiting: you are next");
    case "preparing":
      return notice("compiling for this, once …");
    case "opened":
      opened = said;
      document.documentElement.style.setProperty("--shape", `${said.width} / ${said.height}`);
      player = new Player($("video"), said, {
        more: (chunks) => say("more", { chunks }),
        first: () => ($("first").textContent = `${((performance.now() - begun) / 1000).toFixed(2)} s`),
      });
      show(said);
      return notice("");
    case "chunk":
      expected = said;
      return figures(said);
    case "said":
      show(said.settings);
      return notice("");
    case "want":
      return input?.want(said.frames);
    case "refused":
      return notice(said.why);
    case "end":
      return notice(`the stream has ended: ${said.why}`);
  }
}

function take(data) {
  if (!player) return;
  bytes += data.byteLength;
  if (bytes <= KEEP) recording.push(data);
  $("save").disabled = false;
  player.add(data, expected);
}

function show(settings) {
  $("seed").value = settings.seed;
  $("num_steps").value = settings.num_steps;
  $("guidance_scale").value = settings.guidance_scale ?? "";
  $("guidance_scale").parentElement.hidden = settings.guidance_scale === null; // of a teacher alone
  if (settings.cache_policy) $("cache_policy").value = settings.cache_policy;
}

function figures(chunk) {
  $("latency").textContent = `${(1000 * chunk.latency).toFixed(0)} ms`;
  $("rate").textContent = (Math.round((chunk.seconds * opened.fps) / chunk.latency)).toString();
  $("memory").textContent = `${(chunk.memory / 2 ** 20).toFixed(0)} MiB`;
}

setInterval(() => {
  if (!player) return;
  $("ahead").textContent = player.chunksAhead().toString();
  $("played").textContent = `${$("video").currentTime.toFixed(1)} s`;
}, 200);

async function inputFrom(make) {
  try {
    const next = await make();
    input?.close();
    input = next;
    $("plain").disabled = !input;
    start();
  } catch (error) {
    notice(`no input: ${error.message}`);
  }
}

const brings = { size: () => about.size, fps: () => about.fps, send: (blob) => socket?.readyState === WebSocket.OPEN && socket.send(blob),
  ended: () => say("no_more_video") };

$("prompt-form").onsubmit = (event) => {
  event.preventDefault();
  socket ? say("say", { prompt: $("prompt").value }) : start();
};
$("seed").onchange = () => say("change", { seed: Number($("seed").value) });
$("num_steps").onchange = () => say("change", { num_steps: Number($("num_steps").value) });
$("guidance_scale").onchange = () => say("change", { guidance_scale: Number($("guidance_scale").value) });
$("cache_policy").onchange = () => say("change", { cache_policy: $("cache_policy").value });
$("noise_scale").onchange = () => input && say("change", { noise_scale: Number($("noise_scale").value) });
$("again").onclick = () => start();
$("pause").onclick = () => {
  const on = $("pause").getAttribute("aria-pressed") !== "true";
  $("pause").setAttribute("aria-pressed", on);
  say("pause", { on });
  on ? $("video").pause() : $("video").play().catch(() => {});
};
$("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(recording, { type: "video/mp4" }));
  link.download = "rcm_jax.mp4";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
$("camera").onclick = () => inputFrom(() => Input.camera($("input"), brings));
$("file").onchange = () => $("file").files[0] && inputFrom(() => Input.file($("input"), $("file").files[0], brings));
$("plain").onclick = () => inputFrom(async () => null);
addEventListener("pagehide", stop);
addEventListener("pageshow", (event) => event.persisted && start());

async function main() {
  const response = await fetch(`api${token ? `?token=${encodeURIComponent(token)}` : ""}`);
  if (!response.ok) return notice(await response.text());
  about = await response.json();
  $("network").textContent = `${about.network} · ${about.size.join(" × ")} · ${about.fps} frames a second`;
  if (about.world === "toy") document.documentElement.style.setProperty("--pixels", "pixelated");
  $("prompt").value = about.options.prompt ?? about.prompt;
  $("seed").value = about.options.seed ?? 0;
  for (const steps of about.steps) $("num_steps").add(new Option(steps, steps));
  for (const policy of about.policies) $("cache_policy").add(new Option(policy.replaceAll("_", " "), policy));
  $("num_steps").value = about.settings.num_steps;
  $("cache_policy").value = about.settings.cache_policy ?? "";
  start();
}

main().catch((error) => notice(error.message));
