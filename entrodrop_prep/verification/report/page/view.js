"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const [tokens, details, slider, search, tint] = ["tokens", "details", "epoch", "search", "tint"].map(by);
  const TRAINABLE = 1, ELIGIBLE = 2, SPECIAL = 4, FULL = 75;
  if (!data.rows.length) return;
  by("view").hidden = false;
  slider.max = String(data.rates.length - 1);
  let row = 0, epoch = data.rates.length - 1, at = -1, spans = [];

  const bits = (text) => (text === null ? null : Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  for (const r of data.rows) r.bits = r.dropped.map(bits);
  const isDropped = (r, e, t) => e >= 0 && r.bits[e] !== null && ((r.bits[e][t >> 3] >> (t & 7)) & 1) === 1;
  const shown = (text) =>
    text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (c) =>
      c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"),
    );
  const text = (piece) => (piece === "" ? "\u25cc" : shown(piece).replace(/\n/g, "\u23ce\n"));
  const nats = (value) => (value < 0 ? "none" : (value / 1000).toFixed(3));

  function draw() {
    const r = data.rows[row];
    const parts = document.createDocumentFragment();
    let block = null, on = null;
    spans = r.text.map((piece, t) => {
      const trained = (r.flags[t] & TRAINABLE) !== 0;
      if (data.turns && trained !== on) {
        block = document.createElement("span");
        block.className = trained ? "turn on" : "turn";
        parts.append(block);
        on = trained;
      }
      const span = document.createElement("span");
      span.dataset.t = String(t);
      (block || parts).append(span);
      return span;
    });
    tokens.replaceChildren(parts);
    if (r.all > r.text.length) tokens.append(` \u2026 (${r.all - r.text.length} more tokens)`);
    by("row-label").textContent = `${shown(r.label)} (${row + 1} of ${data.rows.length})`;
    at = -1;
    paint();
  }

  function paint() {
    const r = data.rows[row];
    const scores = tint.value === "none" ? null : r[tint.value];
    const top = tint.value === "entropy" ? data.top_entropy : data.top_surprisal;
    spans.forEach((span, t) => {
      const dropped = isDropped(r, epoch, t);
      const other = dropped ? r.replaced[epoch][t] : undefined;
      const classes = ["t"];
      if (dropped) classes.push("d");
      if (!(r.flags[t] & TRAINABLE)) classes.push("u");
      if (r.flags[t] & SPECIAL) classes.push("s");
      if (t === at) classes.push("c");
      span.className = classes.join(" ");
      span.style.setProperty("--v", String(scores && scores[t] > 0 ? Math.min(FULL, (FULL * scores[t]) / top) : 0));
      span.textContent = text(r.text[t]);
      if (other !== undefined) {
        const replacement = document.createElement("span");
        replacement.className = "r";
        replacement.textContent = `\u2192${text(other).replace(/\n/g, "")}`;
        const [line, ...others] = span.textContent.split(/(?=\n)/); // it stands before the line's end that it replaces
        span.replaceChildren(line, replacement, ...others);
      }
    });
    by("scale-label").textContent =
      tint.value === "none" ? "" : `${tint.value}, 0 to ${(top / 1000).toFixed(1)} nats and more`;
    const here = epoch < 0 ? "before masking" : `epoch ${epoch}, planned rate ${(100 * data.rates[epoch]).toFixed(1)}%`;
    const missing = epoch >= 0 && r.bits[epoch] === null ? "; this row is not in it" : "";
    const count = spans.filter((_, t) => isDropped(r, epoch, t)).length;
    by("epoch-label").textContent = epoch < 0 ? here : `${here}: ${count} tokens dropped${missing}`;
    slider.setAttribute("aria-valuetext", by("epoch-label").textContent);
    tell();
  }

  function tell() {
    const r = data.rows[row];
    if (at < 0) {
      details.textContent = "Point at a token, tap it, or use the arrow keys.";
      return;
    }
    const f = r.flags[at];
    const epochs = r.bits.map((_, e) => e).filter((e) => isDropped(r, e, at));
    const surprisal = r.surprisal === null ? -1 : r.surprisal[at];
    details.textContent = [
      `token ${at}: id ${r.ids[at]} \u201c${text(r.text[at]).replace(/\n/g, "")}\u201d`,
      `entropy ${nats(r.entropy[at])}`,
      surprisal < 0 ? "" : `surprisal ${nats(surprisal)}, probability ${Math.exp(-surprisal / 1000).toPrecision(3)}`,
      f & TRAINABLE ? "trained on" : "not trained on",
      f & SPECIAL ? "special" : "",
      f & ELIGIBLE ? `may be dropped: ${epochs.length ? `in epochs ${epochs.join(", ")}` : "in none of the epochs"}` : "never dropped",
    ].filter(Boolean).join(" \u00b7 ");
  }

  function point(t) {
    if (at >= 0 && spans[at]) spans[at].classList.remove("c");
    at = Math.max(0, Math.min(spans.length - 1, t));
    spans[at].classList.add("c");
    tell();
  }
  function go(to) { row = (to + data.rows.length) % data.rows.length; draw(); }
  function turn(to) { epoch = Math.max(-1, Math.min(data.rates.length - 1, to)); slider.value = String(epoch); paint(); }
  const tokenOf = (event) => { const s = event.target.closest("[data-t]"); return s ? Number(s.dataset.t) : -1; };

  tokens.addEventListener("pointerover", (event) => { const t = tokenOf(event); if (t >= 0) point(t); });
  tokens.addEventListener("click", (event) => { const t = tokenOf(event); if (t >= 0) point(t); });
  tokens.addEventListener("keydown", (event) => {
    const moves = {
      ArrowRight: () => point(at + 1), ArrowLeft: () => point(at - 1), Home: () => point(0), End: () => point(spans.length - 1),
      n: () => go(row + 1), p: () => go(row - 1), "]": () => turn(epoch + 1), "[": () => turn(epoch - 1),
    };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moves[event.key]();
    if (at >= 0) spans[at].scrollIntoView({ block: "nearest" });
  });
  by("previous").addEventListener("click", () => go(row - 1));
  by("next").addEventListener("click", () => go(row + 1));
  slider.addEventListener("input", () => turn(Number(slider.value)));
  tint.addEventListener("change", paint);
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    const has = (r) => r.label.toLowerCase().includes(wanted) || r.text.join("").toLowerCase().includes(wanted);
    const order = data.rows.map((_, i) => (row + i) % data.rows.length);
    const found = wanted ? order.find((i) => has(data.rows[i])) : row;
    search.setAttribute("aria-invalid", String(found === undefined));
    if (found !== undefined && found !== row) go(found);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".go");
    if (!button) return;
    go(Number(button.dataset.row));
    turn(data.rates.length - 1);
    point(Number(button.dataset.token));
    tokens.focus();
    spans[at].scrollIntoView({ block: "center" });
  });
  if (data.rows.every((r) => r.surprisal === null)) tint.querySelector("[value=surprisal]").disabled = true;
  slider.value = String(epoch);
  draw();
})();
