"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data")?.textContent ?? "{}");
  const { heads = [], series = [], checks = [], patterns = [] } = data;
  const SVG = "http://www.w3.org/2000/svg";
  const PAGE = 12;

  function make(tag, attributes = {}, ...children) {
    const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  const number = (x, decimals = 2) => (x === null ? "n/a" : x.toFixed(decimals).replace(/^-(?=0\.?0*$)/, "").replace("-", "−"));
  function score(s, i) {
    const value = s.scores[i], error = s.stderr[i];
    if (value === null || s.n === 0) return number(value);
    return `${number(value, error > 0 && error < 0.01 ? 3 : 2)} ± ${number(error, error > 0 && error < 0.01 ? 3 : 2)}`;
  }
  const reaches = (s, i) => s.threshold !== null && s.scores[i] !== null && s.scores[i] >= s.threshold;

  // What is under the pointer, or under the cursor that the arrow keys move.
  const tip = document.body.appendChild(make("div", { id: "tip", role: "status" }));
  function say(text, x, y) {
    tip.textContent = text;
    tip.classList.add("shown");
    const { width: w, height: h } = tip.getBoundingClientRect();
    const left = Math.min(Math.max(4, x + 14), innerWidth - w - 4);
    tip.style.transform = `translate(${left}px, ${y + 18 + h > innerHeight ? Math.max(4, y - h - 12) : y + 18}px)`;
  }
  const hush = () => tip.classList.remove("shown");
  const visit = (head) => {
    if (!head) return;
    if (location.hash === `#${head}`) dispatchEvent(new HashChangeEvent("hashchange"));
    else location.hash = head;
  };
  addEventListener("scroll", hush, { passive: true });
  document.addEventListener("pointermove", (event) => {
    const marked = event.target.closest?.("[data-tip]");
    if (marked) say(marked.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest?.("table.heat tbody td, svg.pattern, .strip-tokens span")) hush();
  });

  // Heat maps.
  const about = (table, i, cell) => {
    if (!heads.length) {  // a page without data: the names of row and column, and what the cell says
      const column = table.tHead.rows[0].cells[cell.cellIndex].textContent;
      return `${cell.parentElement.cells[0].textContent}${column}: ${cell.textContent}`;
    }
    if (table.dataset.series !== undefined) {
      const s = series[table.dataset.series];
      return `${heads[i]}: ${s.title} ${score(s, i)}`;
    }
    const found = series.filter((s) => reaches(s, i));
    return `${heads[i]}\n` + (found.map((s) => `${s.title} ${score(s, i)}`).join("\n") || "reaches no threshold");
  };
  function heat(table) {
    const rows = table.tBodies[0].rows, width = rows[0].cells.length - 1;
    const cellOf = (i) => rows[Math.floor(i / width)].cells[(i % width) + 1];
    const indexOf = (cell) => cell.parentElement.sectionRowIndex * width + cell.cellIndex - 1;
    let cursor = null;
    const move = (i) => {
      if (cursor !== null) cellOf(cursor).classList.remove("here");
      cursor = i;
      if (i === null) return hush();
      const cell = cellOf(i);
      cell.classList.add("here");
      cell.scrollIntoView({ block: "nearest", inline: "nearest" });
      const box = cell.getBoundingClientRect();
      say(about(table, i, cell), box.right - 14, box.bottom - 18);
    };
    table.addEventListener("pointermove", (event) => {
      const cell = event.target.closest("tbody td");
      if (cell) say(about(table, indexOf(cell), cell), event.clientX, event.clientY);
    });
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("tbody td");
      if (cell) visit(heads[indexOf(cell)]);
    });
    table.addEventListener("blur", () => move(null));
    table.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width }[event.key];
      if (by !== undefined) {
        event.preventDefault();
        const next = (cursor ?? -by) + by;
        if (next >= 0 && next < width * rows.length) move(next);
      } else if (event.key === "Enter" && cursor !== null) visit(heads[cursor]);
      else if (event.key === "Escape") move(null);
    });
  }

  // Attention patterns: a cell of the picture, or a word of the text below it.
  function animate(svg) {
    const { tokens, weights } = patterns[svg.dataset.pattern];
    const bytes = Uint8Array.from(atob(weights), (c) => c.charCodeAt(0));
    const n = tokens.length, left = +svg.dataset.left, side = +svg.dataset.side;
    const weight = (row, column) => bytes[row * n + column] / 255;
    const labels = svg.querySelectorAll(".labels text");
    const cursor = svg.appendChild(make("svg:rect", { class: "cursor", width: side, height: side, visibility: "hidden" }));
    const light = (row, column) => labels.forEach((label) => label.classList.toggle("here", +(label.dataset.row ?? -2) === row || +(label.dataset.key ?? -2) === column));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) * (svg.viewBox.baseVal.width / box.width) - left) / side);
      const row = Math.floor(((event.clientY - box.top) * (svg.viewBox.baseVal.height / box.height)) / side);
      if (row < 0 || column < 0 || row >= n || column >= n) return leave();
      cursor.setAttribute("x", left + column * side);
      cursor.setAttribute("y", row * side);
      cursor.setAttribute("visibility", "visible");
      light(row, column);
      say(`${tokens[row]} (${row}) attends to ${tokens[column]} (${column}): ${number(weight(row, column))}`, event.clientX, event.clientY);
    });
    const leave = () => { cursor.setAttribute("visibility", "hidden"); light(-1, -1); hush(); };
    svg.addEventListener("pointerleave", leave);

    const words = tokens.map((token) => make("span", {}, token));
    const text = make("p", { class: "strip-tokens", role: "group", "aria-label": "The text; point at a token to see what it attends to." });
    words.forEach((word) => text.append(word, "\u200b"));
    svg.after(text);
    const shade = (row) => words.forEach((word, column) => {
      const step = row === null ? 0 : Math.round(20 * weight(row, column));
      word.className = (step ? `q${step}` : "") + (column === row ? " query" : "");
      if (!word.className) word.removeAttribute("class");
    });
    let start = null, best = 0;  // the token that looks back most decidedly, the first token aside
    for (let i = 2; i < n; i++) for (let j = 1; j < i; j++) if (weight(i, j) >= best) [best, start] = [weight(i, j), i];
    shade(start);
    text.addEventListener("pointerover", (event) => {
      const row = words.indexOf(event.target);
      if (row < 0) return;
      shade(row);
      let j = 0;
      for (let k = 1; k < n; k++) if (weight(row, k) > weight(row, j)) j = k;
      say(`${tokens[row]} (${row}) attends most to ${tokens[j]} (${j}): ${number(weight(row, j))}`, event.clientX, event.clientY);
    });
  }
  function enliven(root) {
    root.querySelectorAll("table.heat").forEach(heat);
    root.querySelectorAll("svg.pattern").forEach(animate);
    for (const template of root.querySelectorAll("details > template")) {
      const folded = template.parentElement;
      folded.addEventListener("toggle", () => {
        const inner = template.content.firstElementChild;
        template.replaceWith(inner);
        enliven(inner);
      }, { once: true });
    }
  }
  enliven(document);

  // A link to what is folded unfolds it.
  function unfold() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
    target?.scrollIntoView();
  }
  addEventListener("hashchange", unfold);
  if (location.hash) unfold();

  // A slider over training time: of all moments one is shown.
  for (const slider of document.querySelectorAll("input[data-scrub]")) {
    slider.addEventListener("input", () => {
      for (const node of document.querySelectorAll("[data-moment]")) {
        node.toggleAttribute("hidden", node.dataset.moment !== slider.value);
      }
    });
  }

  // A card a head, made when it comes into view of the search.
  const list = document.getElementById("cards");
  if (!list) return;
  const [query, order, only, tally, more] = ["query", "order", "only", "tally", "more"].map((id) => document.getElementById(id));
  const percent = (s, x) => 100 * Math.min(1, Math.max(0, (x - s.low) / (s.high - s.low)));
  const tested = new Map();
  for (const check of checks) for (const head of check.heads) tested.set(head, [...(tested.get(head) ?? []), check]);

  function bar(s, i) {
    const svg = make("svg:svg", { class: "bar", "aria-hidden": "true" });
    const value = s.scores[i], error = s.stderr[i];
    if (value === null) return svg;
    const zero = percent(s, 0), end = percent(s, value);
    svg.append(
      make("svg:rect", { class: "track", x: "0%", y: 7, width: "100%", height: 2 }),
      make("svg:rect", { class: value < 0 ? "fill minus" : "fill", x: `${Math.min(zero, end)}%`, y: 4, width: `${Math.abs(end - zero)}%`, height: 8 }),
    );
    const line = (x1, x2, y1, y2, name) => svg.append(make("svg:line", { class: name, x1: `${x1}%`, x2: `${x2}%`, y1, y2 }));
    if (s.threshold !== null) line(percent(s, s.threshold), percent(s, s.threshold), 1, 15, "tick");
    if (error > 0) line(percent(s, value - error), percent(s, value + error), 8, 8, "error");
    return svg;
  }
  function card(i) {
    const name = make("h3", {}, heads[i]);
    const row = (s) => make("tr", { class: s.hue }, make("th", { scope: "row", title: s.title }, s.title), make("td", {}, bar(s, i)), make("td", {}, score(s, i)));
    const scores = (some, label) => make("table", { "aria-label": label }, ...some.map(row));
    const found = series.filter((s) => reaches(s, i)), others = series.filter((s) => !reaches(s, i));
    const article = make("article", { class: "card", id: heads[i] }, name);
    if (found.length) article.append(scores(found, `${heads[i]}: scores at a threshold`));
    if (others.length) {
      const folded = make("details", {}, make("summary", {}, found.length ? `${others.length} scores below their thresholds` : `no score reaches its threshold; ${others.length} scores`));
      folded.addEventListener("toggle", () => folded.childElementCount > 1 || folded.append(scores(others, `${heads[i]}: the other scores`)));
      article.append(folded);
    }
    const took = new Map();
    for (const check of tested.get(heads[i]) ?? []) took.set(check.title, [...(took.get(check.title) ?? []), `${check.mode} ${check.p}`]);
    if (took.size) article.append(make("p", {}, "Ablated in the check of " + [...took].map(([title, how]) => `${title} (${how.join(", ")})`).join("; ") + "."));
    return article;
  }

  const titleOf = (s) => s.title.toLowerCase();
  function matching() {
    const terms = query.value.toLowerCase().split(/[\s,;]+/).filter(Boolean);
    const places = terms.filter((t) => /^l\d+(h\d*)?$|^h\d+$/.test(t));
    const words = terms.filter((t) => !places.includes(t));
    const wanted = words.map((w) => series.filter((s) => s.name.includes(w) || titleOf(s).includes(w)));
    const at = (name, t) => (t.includes("h") && /\d$/.test(t) ? name === t || (t[0] === "h" && name.endsWith(t)) : name.startsWith(t.endsWith("h") ? t : t + "h"));
    const found = [...heads.keys()].filter((i) =>
      (!places.length || places.some((t) => at(heads[i].toLowerCase(), t))) &&
      wanted.every((some) => some.some((s) => reaches(s, i))) &&
      (!only.checked || series.some((s) => reaches(s, i))));
    const by = series[order.value];
    return by ? found.sort((a, b) => (by.scores[b] ?? -Infinity) - (by.scores[a] ?? -Infinity)) : found;
  }
  let found = [], shown = 0;
  function show(count) {
    list.append(...found.slice(shown, count).map(card));
    shown = Math.min(found.length, count);
    const all = found.length === 1 ? "1 head" : `${found.length} heads`;
    tally.textContent = found.length
      ? shown < found.length ? `${shown} of ${all} shown` : all
      : "No head matches. Write a head (L4H2), a layer (L4) or a behaviour.";
    more.hidden = shown >= found.length;
  }
  function search() {
    list.replaceChildren();
    shown = 0;
    found = matching();
    show(PAGE);
  }
  function go() {
    const name = decodeURIComponent(location.hash.slice(1));
    if (!heads.includes(name)) return;
    query.value = name;
    only.checked = false;
    search();
    list.firstElementChild?.classList.add("chosen");
    document.getElementById("heads").scrollIntoView();
  }
  query.addEventListener("input", search);
  order.addEventListener("change", search);
  only.addEventListener("change", search);
  more.addEventListener("click", () => show(shown + 4 * PAGE));
  addEventListener("hashchange", go);
  document.getElementById("finder").hidden = false;
  search();
  go();
})();
