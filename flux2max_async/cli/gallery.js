"use strict";
const list = document.getElementById("cards"), filter = document.getElementById("filter");
const sort = document.getElementById("sort"), count = document.getElementById("count");
const template = document.getElementById("card").content;
const entries = JSON.parse(document.getElementById("data").textContent);
entries.forEach((entry, order) => {
  const {prompt, state, seed, key, reason, problem, location} = entry;
  entry.order = order;
  // Not the hash in a key that was derived from the prompt: nobody can know why it matches.
  const texts = [prompt, state, seed && `seed ${seed}`, entry.ownKey && key, reason, problem, location];
  entry.searchText = texts.filter(Boolean).join(" ").toLowerCase();
  [entry.width, entry.height] = entry.url && entry.size ? entry.size.split("×").map(Number) : [];
});
// Width divided by height of the frames: nine of ten pictures fill the width, but a frame is taller than wide only if
// most pictures are.
const ratios = entries.filter((entry) => entry.width).map((entry) => entry.width / entry.height).sort((a, b) => a - b);
const ratioAt = (share) => ratios[Math.floor(share * ratios.length)] ?? 1;
const frameRatio = Math.min(2, Math.max(ratioAt(0.1), Math.min(1, ratioAt(0.5)), 0.5));
list.style.setProperty("--ratio", frameRatio);

// The entries that match the filter, in the chosen order, and those of them with a picture.
let shown = [], pictures = [];
const ORDERS = {
  order: () => 0,
  state: (a, b) => a.rank - b.rank,
  cost: (a, b) => (b.cost ?? -1) - (a.cost ?? -1),
  time: (a, b) => (b.seconds ?? -1) - (a.seconds ?? -1),
};

// Filter and order are stored in the fragment of the URL, so that they survive a reload.
const state = new URLSearchParams(location.hash.slice(1));
filter.value = state.get("filter") ?? "";
sort.value = Object.hasOwn(ORDERS, state.get("sort")) ? state.get("sort") : "order";

function addElement(parent, tag, properties) {
  parent.append(Object.assign(document.createElement(tag), properties));
  return parent.lastChild;
}

function facts(entry) {
  const {state, seconds} = entry;
  return [
    ["state", "State", state === "completed" ? undefined : state], ["size", "Size in pixels", entry.size],
    ["cost", "Cost", entry.cost && `$${entry.cost}`], ["time", "Time", seconds && `${seconds} s`],
    ["seed", "seed", entry.seed], ["part", "Picture", entry.part], ["variant", "Variant", entry.variant],
  ].filter(([, , value]) => value !== undefined);
}

// The address of a picture in object storage, as a link if a browser can open it.
function addLocation(parent, {location, link}, textContent = location) {
  if (link) addElement(parent, "a", {textContent, href: link, target: "_blank", rel: "noreferrer"});
  else addElement(parent, "span", {textContent});
}

function createCard(entry) {
  const card = template.firstElementChild.cloneNode(true), about = card.querySelector(".about");
  card.classList.add(entry.state);
  card.entry = entry;
  if (entry.url) {
    const link = addElement(card, "a", {className: "frame", href: entry.link ?? entry.url});
    if (entry.width) link.style.aspectRatio = Math.max(frameRatio, entry.width / entry.height);
    addElement(link, "img", {loading: "lazy", decoding: "async", alt: entry.prompt, src: entry.thumbnail});
  } else {
    const reason = addElement(addElement(card, "div", {className: "frame"}), "p", {className: "reason", dir: "auto"});
    if (entry.location) addLocation(reason, entry);
    else reason.textContent = entry.reason;
  }
  card.prepend(card.lastChild);
  about.querySelector(".prompt").textContent = entry.prompt;
  const list = about.querySelector(".facts");
  if (entry.problem) list.before(addElement(about, "p", {className: "problem", dir: "auto", textContent: entry.problem}));
  for (const [className, name, value] of facts(entry)) {
    const fact = addElement(list, "div", {className});
    addElement(fact, "dt", {textContent: name});
    addElement(fact, "dd", {textContent: value});
  }
  if (entry.url && entry.link) {
    const fact = addElement(list, "div", {className: "stored"});
    addElement(fact, "dt", {textContent: "Picture in full"});
    addLocation(addElement(fact, "dd"), entry, "original");
  }
  return card;
}

// Of a long list, only the cards near the visible part exist, and the one that has the focus. Up to 500, all exist, so
// that the browser's own search finds their texts.
const cards = new Map();
const focusedPicture = () => document.activeElement.closest("#cards > li")?.entry;
// The entry in each cell of the grid, counted row by row; a row's last cells may be empty.
let cells = [], columns = 1, step = 1, cardWidth = 0;

function place(entry, previous) {
  const card = cards.get(entry) ?? createCard(entry), column = entry.cell % columns + 1;
  cards.set(entry, card);
  card.style.gridColumn = `${column} / ${column + 1}`;
  card.style.top = `${Math.floor(entry.cell / columns) * step}px`;
  card.classList.toggle("first", entry.span > 1);
  card.style.setProperty("--span", entry.span);
  if (entry.width) {
    const more = Math.max(0, cardWidth / frameRatio - cardWidth * entry.height / entry.width);
    card.style.setProperty("--more", `${more}px`);
    card.style.setProperty("--more-lines", Math.floor(more / lineHeight));
  }
  card.setAttribute("aria-posinset", entry.position + 1);
  card.setAttribute("aria-setsize", shown.length);
  const next = previous ? previous.nextSibling : list.firstChild;
  if (next !== card) list.insertBefore(card, next);
  return card;
}

function render(focused = focusedPicture()) {
  const margin = shown.length > 500 ? innerHeight : Infinity, top = list.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor((-top - margin) / step)) * columns;
  const last = Math.max(0, Math.ceil((innerHeight - top + margin) / step)) * columns;
  const visible = cells.slice(first, last).filter(Boolean);
  if (focused && shown[focused.position] === focused && !visible.includes(focused)) {
    focused.cell < first ? visible.unshift(focused) : visible.push(focused);
  }
  const wanted = new Set(visible);
  for (const [entry, card] of cards) if (!wanted.has(entry)) { card.remove(); cards.delete(entry); }
  visible.reduce((previous, entry) => place(entry, previous), null);
  // Without a mouse, a long reason can be scrolled only if it can have the focus.
  for (const reason of list.querySelectorAll(".reason")) {
    if (reason.scrollHeight > reason.clientHeight) reason.tabIndex = 0;
    else reason.removeAttribute("tabindex");
  }
}

// Assign a cell to each entry. Variants of a prompt that follow each other stay in one row if they fit.
function assignCells() {
  cells = [];
  for (let start = 0, end; start < shown.length; start = end) {
    const group = shown[start].group;
    end = start + 1;
    while (group !== undefined && shown[end]?.group === group) end += 1;
    const free = (columns - cells.length % columns) % columns;
    if (end - start > free) cells.length += free;
    for (let index = start; index < end; index += 1) {
      const entry = shown[index], column = cells.length % columns;
      entry.cell = cells.length;
      entry.span = index === start || column === 0 ? Math.min(end - index, columns - column) : 1;
      cells.push(entry);
    }
  }
}

function layOut() {
  const style = getComputedStyle(list);
  columns = style.gridTemplateColumns.split(" ").length;
  assignCells();
  if (shown.length) {
    const card = place(shown[0], null).getBoundingClientRect();
    step = card.height + parseFloat(style.rowGap);
    cardWidth = card.width;
  }
  list.style.height = `${Math.ceil(cells.length / columns) * step}px`;
  render();
}

function update() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = entries.filter(({searchText, key}) => words.every((word) => searchText.includes(word) || key.toLowerCase() === word));
  shown.sort((a, b) => ORDERS[sort.value](a, b) || a.order - b.order);
  shown.forEach((entry, position) => { entry.position = position; });
  pictures = shown.filter((entry) => entry.url);
  count.textContent = words.length ? `${shown.length} of ${entries.length} shown` : "";
  document.getElementById("none").hidden = shown.length > 0 || !entries.length;
  const newState = new URLSearchParams();
  if (filter.value) newState.set("filter", filter.value);
  if (sort.value !== "order") newState.set("sort", sort.value);
  history.replaceState(null, "", `#${newState}`);
  layOut();
}

function focusPicture(entry, {scroll = true} = {}) {
  if (!entry) return;
  render(entry);
  cards.get(entry).querySelector("a").focus({preventScroll: true});
  if (scroll) cards.get(entry).scrollIntoView({block: "nearest"});
}

// The picture in full.
const dialog = document.querySelector("dialog"), viewer = document.getElementById("viewer");
const full = viewer.querySelector("img"), caption = document.getElementById("caption");
const zoom = document.getElementById("zoom");
let openIndex = -1;

function setSize(width, height) {
  full.style.setProperty("--width", width ? `${width}px` : "auto");
  full.style.setProperty("--ratio", width ? width / height : 1);
}

function showImage(index) {
  if (!pictures.length) return;
  openIndex = (index + pictures.length) % pictures.length;
  const entry = pictures[openIndex];
  setSize(entry.width, entry.height);
  full.src = entry.url;
  full.alt = entry.prompt;
  const details = document.createElement("small");
  const values = facts(entry).map(([name, label, value]) => (name === "seed" ? `${label} ${value}` : value));
  details.textContent = [`${openIndex + 1} of ${pictures.length}`, ...values, entry.key, entry.problem].filter(Boolean).join(" · ");
  caption.replaceChildren(full.alt, details);
  if (entry.location) addLocation(addElement(caption, "small", {id: "stored"}), entry);
  if (!dialog.open) dialog.showModal();
}

// Show the actual size, one pixel of the picture in each pixel of the page, or the whole picture. The point of the
// picture at (x, y), as shares of its width and height, goes to the middle.
function setZoom(zoomed, x = 0.5, y = 0.5) {
  dialog.classList.toggle("zoomed", zoomed);
  zoom.setAttribute("aria-pressed", zoomed);
  viewer.scrollTo(x * full.width - viewer.clientWidth / 2, y * full.height - viewer.clientHeight / 2);
}
const isZoomed = () => dialog.classList.contains("zoomed");

async function copyPrompt({prompt}) {
  const notice = (dialog.open ? dialog : document.body).querySelector(":scope > .notice");
  try {
    await navigator.clipboard.writeText(prompt);
    notice.textContent = "Prompt copied.";
  } catch {
    notice.textContent = "The browser doesn't allow copying here: select the prompt instead.";
  }
  setTimeout(() => { notice.textContent = ""; }, 3000);
}

list.addEventListener("click", (event) => {
  const link = event.target.closest("a.frame");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  showImage(pictures.indexOf(link.parentElement.entry));
});
const ON_CLICK = {
  previous: () => showImage(openIndex - 1),
  next: () => showImage(openIndex + 1),
  zoom: () => setZoom(!isZoomed()),
  copy: () => copyPrompt(pictures[openIndex]),
  close: () => dialog.close(),
};
for (const [id, action] of Object.entries(ON_CLICK)) document.getElementById(id).addEventListener("click", action);
// Of a picture in object storage, the dialog shows the thumbnail, enlarged.
full.addEventListener("load", () => { if (!pictures[openIndex].location) setSize(full.naturalWidth, full.naturalHeight); });
full.addEventListener("click", ({offsetX, offsetY}) => {
  if (!wasDragged) setZoom(!isZoomed(), offsetX / full.width, offsetY / full.height);
});
viewer.addEventListener("click", ({target}) => { if (target === viewer && !wasDragged) dialog.close(); });
// The mouse moves a picture in its actual size; for fingers, the browser does that itself.
let wasDragged = false;
full.addEventListener("dragstart", (event) => event.preventDefault());
viewer.addEventListener("pointerdown", () => { wasDragged = false; });
viewer.addEventListener("pointermove", ({pointerType, buttons, movementX, movementY}) => {
  if (pointerType !== "mouse" || buttons !== 1 || !isZoomed() || !(movementX || movementY)) return;
  wasDragged = true;
  viewer.scrollBy(-movementX, -movementY);
});
dialog.addEventListener("close", () => {
  setZoom(false);
  full.removeAttribute("src");
  focusPicture(pictures[openIndex]);
});

function onDialogKey(event) {
  const pan = {ArrowLeft: [-80, 0], ArrowRight: [80, 0], ArrowUp: [0, -80], ArrowDown: [0, 80]}[event.key];
  const index = {
    ArrowLeft: openIndex - 1, ArrowRight: openIndex + 1, PageUp: openIndex - 1, PageDown: openIndex + 1, Home: 0, End: -1,
  }[event.key];
  const onPicture = document.activeElement === full && (event.key === "Enter" || event.key === " ");
  if (event.key === "c") copyPrompt(pictures[openIndex]);
  else if (event.key === "z" || onPicture) setZoom(!isZoomed());
  else if (pan && isZoomed()) viewer.scrollBy(...pan);
  else if (index !== undefined) showImage(index);
  else return;
  event.preventDefault();
}

// The arrow keys go from image to image, in the dialog and in the grid.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (dialog.open) { onDialogKey(event); return; }
  if (event.key === "/" && document.activeElement !== filter) { event.preventDefault(); filter.focus(); return; }
  const current = focusedPicture();
  if (!current) return;
  if (event.key === "c") copyPrompt(current);
  const index = pictures.indexOf(current);
  const inColumn = (entry) => (entry.cell - current.cell) % columns === 0;
  const next = {
    ArrowLeft: () => pictures[index - 1],
    ArrowRight: () => pictures[index + 1],
    ArrowUp: () => pictures.slice(0, index).findLast(inColumn),
    ArrowDown: () => pictures.slice(index + 1).find(inColumn),
    Home: () => pictures[0],
    End: () => pictures.at(-1),
  }[event.key]?.();
  if (next) { event.preventDefault(); focusPicture(next); }
});

for (const control of [filter, sort]) control.addEventListener("input", () => { update(); scrollTo(0, 0); });
// The paragraph is as wide as the list, whose own height changes with its layout.
const lineHeight = parseFloat(getComputedStyle(document.body).lineHeight);
new ResizeObserver(() => {
  const top = () => list.getBoundingClientRect().top, first = Math.round(-top() / step) * columns;
  layOut();
  if (first > 0) scrollBy(0, top() + Math.floor(first / columns) * step);
}).observe(count);
list.addEventListener("focusin", () => render());  // the next card exists before the Tab key asks for it
let isFrameRequested = false;
addEventListener("scroll", () => {
  if (isFrameRequested) return;
  isFrameRequested = true;
  requestAnimationFrame(() => { isFrameRequested = false; render(); });
}, {passive: true});
update();

// While the batch is running, the page reloads itself, unless the visitor is busy with it. The focus is restored after
// that. A page that was not rewritten for two minutes probably belongs to a process that has died: it reloads less often.
const focusKey = `focus ${location.pathname}`;
let lastInput = 0, loaded = Date.now();
for (const type of ["keydown", "pointerdown", "input"]) document.addEventListener(type, () => { lastInput = Date.now(); });
if ("running" in document.body.dataset) {
  const stale = Date.now() / 1000 - document.body.dataset.running > 120;
  setInterval(() => {
    const now = Date.now(), idle = !dialog.open && !document.hidden && now - lastInput > 5000;
    if (!idle || (stale && now - loaded < 60000)) return;
    const active = document.activeElement;
    try { sessionStorage.setItem(focusKey, active.id ? `#${active.id}` : `${pictures.indexOf(focusedPicture())}`); } catch { /* storage is disabled */ }
    location.reload();
  }, 10000);
}
try {
  const id = sessionStorage.getItem(focusKey) ?? "";
  sessionStorage.removeItem(focusKey);
  if (id.startsWith("#")) document.getElementById(id.slice(1))?.focus({preventScroll: true});
  else if (id) focusPicture(pictures[id], {scroll: false});
} catch { /* storage is disabled */ }
