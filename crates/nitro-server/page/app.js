// The page: a form, the requests under way, the gallery, one picture large.

import * as api from "./api.js";
import * as gallery from "./gallery.js";

const $ = (id) => document.getElementById(id);
const FORM = "nitro.form";
const THEME = "nitro.theme";

let models = [];
let pictures = [];
let init = null; // a Blob to start from
let open = null; // the picture in the viewer
const jobs = []; // requests under way, newest last

// ---- Models and the form ----

async function loadModels() {
  try {
    models = (await api.models()).filter(
      (model, i, all) => all.findIndex((m) => m.nitro.variant === model.nitro.variant) === i,
    );
  } catch (error) {
    if (error.status === 401) return askKey();
    $("model").textContent = error.message;
    setTimeout(loadModels, 2000);
    return;
  }
  const { nitro } = models[0];
  $("model").textContent = nitro.model;
  $("variant").replaceChildren(
    ...models.map(({ nitro }) => new Option(nitro.variant, nitro.variant)),
  );
  $("steps").max = nitro.max_steps;
  $("count").max = nitro.max_images;
  $("size").max = nitro.max_side;
  applyDefaults();
  restoreForm();
}

const chosen = () => models.find((m) => m.nitro.variant === $("variant").value)?.nitro;

function applyDefaults() {
  const nitro = chosen();
  $("steps").value = nitro.steps;
  $("guidance").value = nitro.guidance_scale;
  $("size").value = nitro.resolution;
}

const FIELDS = ["prompt", "negative", "variant", "steps", "guidance", "size", "count", "seed"];

function saveForm() {
  const values = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
  localStorage.setItem(FORM, JSON.stringify({ ...values, model: models[0]?.nitro.model }));
}

function restoreForm() {
  const saved = JSON.parse(localStorage.getItem(FORM) ?? "{}");
  // Another model has other defaults; its words may stay.
  const same = saved.model === models[0].nitro.model;
  for (const id of same ? FIELDS : ["prompt", "negative"]) {
    if (saved[id] !== undefined && saved[id] !== "") $(id).value = saved[id];
  }
  if (!$("variant").value) $("variant").selectedIndex = 0;
}

function settings() {
  const wanted = {
    prompt: $("prompt").value,
    variant: $("variant").value,
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
    size: `${$("size").value}x${$("size").value}`,
    n: Number($("count").value),
    partial_images: $("previews").checked ? 6 : 0,
  };
  if ($("negative").value) wanted.negative_prompt = $("negative").value;
  if ($("seed").value !== "") wanted.seed = Number($("seed").value);
  if (init) wanted.strength = Number($("strength").value);
  return wanted;
}

function setInit(blob) {
  init = blob;
  $("init").hidden = !blob;
  if ($("init-image").src) URL.revokeObjectURL($("init-image").src);
  if (blob) $("init-image").src = URL.createObjectURL(blob);
  else $("init-file").value = "";
}

// ---- Requests ----

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function paint() {
  const wanted = settings();
  const from = init;
  const job = { abort: new AbortController() };
  const what = element("p", { className: "what", textContent: wanted.prompt });
  const cancel = element("button", { type: "button", className: "cancel", textContent: "Cancel" });
  const note = element("p", { className: "note quiet", textContent: "sent" });
  const bar = element("progress", { max: 1, value: 0, ariaLabel: "Progress" });
  const previews = element("div", { className: "previews" });
  const card = element("article", { className: "job" },
    element("div", { className: "row" }, what, cancel), bar, note, previews);
  cancel.onclick = () => job.abort.abort();
  jobs.push(job);
  $("jobs").prepend(card);
  $("message").textContent = "";

  const steps = new Array(wanted.n).fill(0);
  const images = [];
  const show = (index, blob) => {
    images[index] ??= previews.appendChild(
      element("img", { alt: `Preview of picture ${index + 1}` }));
    if (images[index].src) URL.revokeObjectURL(images[index].src);
    images[index].src = URL.createObjectURL(blob);
  };
  const hear = async (event) => {
    switch (event.type) {
      case "nitro.queued":
        note.textContent = event.ahead ? `waiting, ${event.ahead} before you` : "next in the queue";
        break;
      case "nitro.started":
        note.textContent = event.warnings.join("; ") || "begun";
        break;
      case "nitro.progress":
        steps[event.image_index] = event.step / event.steps;
        bar.value = steps.reduce((a, b) => a + b, 0) / steps.length;
        note.textContent = `step ${event.step} of ${event.steps}`;
        break;
      default:
        if (event.type.endsWith(".partial_image")) {
          show(event.image_index, api.pictureBlob(event.b64_json));
        } else if (event.type.endsWith(".completed")) {
          steps[event.image_index] = 1;
          images[event.image_index]?.remove();
          await keep(event, wanted, from);
        }
    }
  };

  const kept = [];
  try {
    await api.generate(wanted, from, (event) => kept.push(hear(event)), job.abort.signal);
    await Promise.all(kept);
    $("status").textContent = `${kept.length ? "Done" : "Nothing came"}: ${wanted.prompt}`;
  } catch (error) {
    if (job.abort.signal.aborted) $("status").textContent = "Cancelled";
    else if (error.status === 401) askKey();
    else $("message").textContent = error.message;
  }
  jobs.splice(jobs.indexOf(job), 1);
  images.forEach((image) => URL.revokeObjectURL(image.src));
  card.remove();
}

async function keep(event, wanted, from) {
  const picture = {
    blob: api.pictureBlob(event.b64_json),
    created: Date.now(),
    settings: {
      prompt: wanted.prompt,
      negative_prompt: wanted.negative_prompt ?? "",
      variant: wanted.variant,
      steps: wanted.num_inference_steps,
      guidance_scale: wanted.guidance_scale,
      size: Number(event.size.split("x")[0]),
      seed: event.seed,
      strength: from ? wanted.strength : undefined,
      model: chosenModel(wanted.variant)?.model,
      command: chosenModel(wanted.variant)?.command_line ?? "",
    },
  };
  let stored;
  try {
    stored = await gallery.add(picture);
  } catch (error) {
    $("message").textContent = `The picture could not be kept: ${error.message}`;
    stored = { ...picture, id: `unsaved-${Date.now()}` };
  }
  pictures.unshift(stored);
  addThumbnail(stored, true);
}

const chosenModel = (variant) => models.find((m) => m.nitro.variant === variant)?.nitro;

// ---- The gallery ----

function addThumbnail(picture, first) {
  const { prompt, seed } = picture.settings;
  picture.url = URL.createObjectURL(picture.blob);
  const image = element("img", { src: picture.url, alt: prompt, loading: "lazy" });
  const button = element("button", { type: "button", title: `${prompt} (seed ${seed})` }, image);
  button.onclick = () => view(picture);
  picture.item = element("li", {}, button);
  if (first) $("gallery").prepend(picture.item);
  else $("gallery").append(picture.item);
  $("empty").hidden = true;
}

async function loadGallery() {
  pictures = await gallery.all().catch(() => []);
  pictures.forEach((picture) => addThumbnail(picture, false));
}

// ---- One picture ----

const LABELS = {
  prompt: "Prompt", negative_prompt: "Negative prompt", seed: "Seed", steps: "Steps",
  guidance_scale: "Guidance", size: "Size", strength: "Change", variant: "Variant", model: "Model",
};

function view(picture) {
  open = picture;
  $("viewer-image").src = picture.url;
  $("viewer-image").alt = picture.settings.prompt;
  $("viewer-settings").replaceChildren(
    ...Object.entries(LABELS)
      .filter(([name]) => picture.settings[name] !== undefined && picture.settings[name] !== "")
      .flatMap(([name, label]) => [
        element("dt", { textContent: label }),
        element("dd", { textContent: picture.settings[name] }),
      ]),
  );
  $("download").href = picture.url;
  $("download").download = `nitro-${picture.settings.seed}.png`;
  $("viewer-message").textContent = "";
  if (!$("viewer").open) $("viewer").showModal();
}

function neighbour(offset) {
  const next = pictures[pictures.indexOf(open) + offset];
  if (next) view(next);
}

const quote = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;

// The command line that makes the same picture.
function command({ settings: s }) {
  const parts = ["nitro generate", quote(s.prompt)];
  if (s.negative_prompt) parts.push("--negative-prompt", quote(s.negative_prompt));
  parts.push("--seed", s.seed, "--steps", s.steps, "--guidance-scale", s.guidance_scale);
  parts.push("--size", s.size, "--variant", s.variant);
  if (s.strength !== undefined) parts.push("--init-image INPUT.png --strength", s.strength);
  if (s.command) parts.push(s.command);
  return `${parts.join(" ")} -o out.png`;
}

async function copy() {
  const text = command(open);
  try {
    await navigator.clipboard.writeText(text);
    $("viewer-message").textContent = "Copied.";
  } catch {
    $("viewer-message").textContent = text; // no clipboard without https: copy it from here
  }
}

function reuse() {
  const s = open.settings;
  const values = {
    prompt: s.prompt, negative: s.negative_prompt, variant: s.variant, steps: s.steps,
    guidance: s.guidance_scale, size: s.size, seed: s.seed,
  };
  for (const [id, value] of Object.entries(values)) $(id).value = value;
  saveForm();
  toForm();
}

function startFrom() {
  setInit(open.blob);
  toForm();
}

// Closes the viewer; the focus goes on to the prompt, not back to the picture.
function toForm() {
  open = null;
  $("viewer").close();
  $("prompt").focus();
}

async function remove() {
  const gone = open;
  const at = pictures.indexOf(gone);
  pictures.splice(at, 1);
  await gallery.remove(gone.id);
  gone.item.remove();
  URL.revokeObjectURL(gone.url);
  $("empty").hidden = pictures.length > 0;
  if (pictures.length) view(pictures[Math.min(at, pictures.length - 1)]);
  else $("viewer").close();
}

// ---- Key, theme, shortcuts ----

function askKey() {
  $("key-value").value = "";
  if (!$("key").open) $("key").showModal();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem(THEME, theme);
}

function shortcut(event) {
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("viewer").open) {
    event.preventDefault();
    $("form").requestSubmit();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    jobs.at(-1)?.abort.abort();
  } else if (event.ctrlKey || event.metaKey || event.altKey || typing) {
    return;
  } else if ($("viewer").open) {
    const actions = {
      ArrowLeft: () => neighbour(-1), ArrowRight: () => neighbour(1), c: copy,
      d: () => $("download").click(), i: startFrom, u: reuse,
    };
    if (!actions[event.key]) return;
    event.preventDefault(); // or the letter is typed where the focus goes
    actions[event.key]();
  } else if (event.key === "/") {
    event.preventDefault();
    $("prompt").focus();
  } else if (event.key === "?") {
    $("help").showModal();
  }
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  saveForm();
  paint();
};
$("variant").onchange = applyDefaults;
$("init-file").onchange = (event) => setInit(event.target.files[0] ?? null);
$("init-clear").onclick = () => setInit(null);
$("strength").oninput = () => { $("strength-value").textContent = $("strength").value; };
$("copy").onclick = copy;
$("reuse").onclick = reuse;
$("start-from").onclick = startFrom;
$("delete").onclick = remove;
$("viewer-close").onclick = () => $("viewer").close();
$("viewer").onclose = () => { open?.item.querySelector("button")?.focus(); };
$("help-open").onclick = () => $("help").showModal();
$("key").onclose = () => { api.setKey($("key-value").value.trim()); loadModels(); };
$("theme").onclick = () => {
  const themes = ["system", "light", "dark"];
  setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
};
document.addEventListener("keydown", shortcut);

setTheme(localStorage.getItem(THEME) ?? "system");
loadGallery();
loadModels();
