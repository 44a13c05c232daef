// The trace page (trace_html.py): plays the changes of each trace back. Text from a model only ever becomes textContent.
"use strict";
(() => {
  const {traces, kinds, levels} = JSON.parse(document.getElementById("data").textContent);
  const MASK = kinds.indexOf("remask"), FILL = kinds.indexOf("fill"), EDIT = kinds.indexOf("edit"), CONFIRM = kinds.indexOf("confirm");
  const STEPS = 6;
  const by = id => document.getElementById(id);
  const [play, slider, shown, clock, speed, colour, tip, status] = ["play", "step", "shown", "clock", "speed", "colour", "tip", "status"].map(by);
  const one = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  let timer = null;

  // The canvas after `step` steps: for each position its token (null: masked), the step that wrote it, its confidence and last change.
  function canvas(trace, step) {
    const cells = Array.from({length: trace.length}, (_, position) => ({token: trace.pinned[position] ?? null, step: 0, sure: null, kind: null}));
    trace.frames.slice(0, step).forEach((frame, index) => {
      for (const [position, kind, token, , sure] of frame.changes)
        cells[position] = {token: kind === MASK ? null : token, step: index + 1, sure, kind};
    });
    return cells;
  }

  const piece = (trace, token) => trace.pieces[token] ?? `<${token}>`;
  // Where a token ends a line, the sign for it stands before the break.
  const visible = text => text.replaceAll("\n", "\u23ce\n");
  const level = sure => levels.filter(bound => sure >= bound).length;

  function counted(trace, cells) {
    let total = 0;
    for (const cell of cells) {
      if (cell.token !== null && cell.step > 0 && cell.kind !== FILL) total++;
      if (cell.token !== null && trace.eos_ids.includes(cell.token)) break;
    }
    return total;
  }

  const panels = traces.map((trace, index) => {
    const root = by(`panel${index}`);
    const last = canvas(trace, trace.frames.length);
    const tokens = root.querySelector(".tokens");
    // A mask is as wide as the token that will stand there, so that the text does not jump.
    const spans = last.map((cell, position) => {
      const span = document.createElement("span");
      span.dataset.position = position;
      tokens.append(span);
      return span;
    });
    return {trace, root, last, spans, numbers: root.querySelector(".numbers"), strip: root.querySelector(".strip"), cursor: root.querySelector(".cursor"), step: 0};
  });

  function stepOf(panel, value) {
    if (clock.value === "step") return Math.min(value, panel.trace.frames.length);
    return panel.trace.frames.filter(frame => frame.forwards <= value).length;
  }

  function draw(panel, value) {
    const {trace, spans, last} = panel, step = panel.step = stepOf(panel, value);
    const cells = canvas(trace, step), frame = step ? trace.frames[step - 1] : null;
    const next = trace.frames[Math.min(step, trace.frames.length - 1)]; // what is open before the first step
    const about = frame ?? next ?? {blocks: [0], open: [], closed: []};
    const inside = (runs, position) => runs.some(([first, stop]) => first <= position && position < stop);
    const ticks = about.blocks.length > 1 && about.blocks.length < trace.length;
    cells.forEach((cell, position) => {
      const names = ["t"], span = spans[position];
      if (ticks && position && about.blocks.includes(position)) names.push("first");
      if (inside(about.open, position)) names.push("open");
      if (cell.step === step && step) names.push("new", kinds[cell.kind]);
      else if (cell.kind === EDIT || cell.kind === CONFIRM) names.push(kinds[cell.kind]);
      const text = cell.token ?? last[position].token;
      const filled = cell.kind === FILL || (cell.token === null && last[position].kind === FILL);
      if (cell.token === null) names.push("mask");
      else if (filled) names.push("filled");
      else if (cell.step === 0) names.push("pinned");
      else if (colour.value === "step") names.push(`s${Math.floor((cell.step - 1) * STEPS / trace.frames.length)}`);
      else if (cell.sure !== null) names.push(`k${level(cell.sure)}`);
      const shownText = filled ? "\u00b7" : text === null ? "   " : visible(piece(trace, text));
      if (shownText.includes("\n")) names.push("line");
      // Long answers have thousands of these, few of which change in a step.
      if (span.textContent !== shownText) span.textContent = shownText;
      if (span.className !== names.join(" ")) {
        span.className = names.join(" ");
        span.ariaHidden = cell.token === null ? "true" : null;
      }
    });
    panel.cells = cells;
    const decided = cells.filter(cell => cell.token !== null && cell.kind !== FILL).length, forwards = frame ? frame.forwards : 0;
    const words = [`step ${step} of ${trace.frames.length}`, one(forwards, "forward"), `${decided} of ${trace.length} decided`];
    if (forwards) words.push(`${(counted(trace, cells) / forwards).toFixed(2)} tokens/forward`);
    if (frame && frame.forced) words.push(`${frame.forced} forced`);
    if (frame && frame.edits) words.push(`${frame.edits} edited or taken back`);
    if (frame && frame.ended) words.push(`finished: ${frame.ended}`);
    panel.numbers.textContent = words.join(" \u00b7 ");
    if (panel.cursor) {
      const y = panel.cursor.dataset.top * 1 + step * panel.cursor.dataset.high;
      panel.cursor.setAttribute("y1", y);
      panel.cursor.setAttribute("y2", y);
    }
    strip(panel, about, cells, ticks, inside);
  }

  function strip(panel, about, cells, ticks, inside) {
    const bounds = ticks ? [...about.blocks, cells.length] : [];
    panel.strip.replaceChildren(...bounds.slice(0, -1).map((first, index) => {
      const block = document.createElement("span"), bar = document.createElement("i"), stop = bounds[index + 1];
      const share = cells.slice(first, stop).filter(cell => cell.token !== null).length / (stop - first);
      const positions = Array.from({length: stop - first}, (_, offset) => first + offset);
      const state = positions.some(place => inside(about.open, place)) ? "open" : positions.every(place => inside(about.closed, place)) ? "closed" : "waiting";
      block.className = state;
      block.title = `block ${index + 1}: ${state}, ${Math.round(100 * share)} % decided`;
      bar.style.width = `${100 * share}%`;
      block.append(bar);
      return block;
    }));
  }

  function limit() {
    const ends = traces.map(trace => clock.value === "step" ? trace.frames.length : trace.frames.length ? trace.frames.at(-1).forwards : 0);
    slider.max = Math.max(0, ...ends);
  }

  function show(value) {
    value = Math.max(0, Math.min(Number(slider.max), Math.round(value) || 0));
    slider.value = value;
    document.body.dataset.colour = colour.value;
    panels.forEach(panel => draw(panel, value));
    shown.textContent = `${clock.value} ${value} of ${slider.max}`;
    slider.setAttribute("aria-valuetext", shown.textContent);
    if (timer === null) { // not while it plays: a screen reader would never stop
      status.textContent = panels.map(panel => `${panel.trace.name}: ${panel.numbers.textContent}`).join(". ");
      try {
        history.replaceState(null, "", `#step=${value}&clock=${clock.value}&colour=${colour.value}`);
      } catch { /* a page in a frame has no address of its own */ }
    }
    tip.hidden = true;
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    play.textContent = "\u25b6 Play";
  }

  function start() {
    if (Number(slider.value) >= Number(slider.max)) show(0);
    play.textContent = "\u23f8 Pause";
    timer = setInterval(() => {
      const value = Number(slider.value) + 1;
      if (value >= Number(slider.max)) pause();
      show(value);
    }, 1000 / Number(speed.value));
  }

  function move(value) {
    pause();
    show(value);
  }

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (["step", "forward"].includes(asked.get("clock"))) clock.value = asked.get("clock");
    if (["confidence", "step"].includes(asked.get("colour"))) colour.value = asked.get("colour");
    limit();
    show(asked.has("step") ? Number(asked.get("step")) : Number(slider.max));
  }

  play.addEventListener("click", () => timer === null ? start() : move(Number(slider.value)));
  by("back").addEventListener("click", () => move(Number(slider.value) - 1));
  by("on").addEventListener("click", () => move(Number(slider.value) + 1));
  slider.addEventListener("input", () => move(Number(slider.value)));
  colour.addEventListener("change", () => show(Number(slider.value)));
  clock.addEventListener("change", () => {
    const share = Number(slider.value) / Math.max(1, Number(slider.max));
    limit();
    move(share * Number(slider.max));
  });
  speed.addEventListener("change", () => {
    if (timer === null) return;
    pause();
    start();
  });
  addEventListener("hashchange", read);
  addEventListener("keydown", event => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, summary, a")) return;
    const value = Number(slider.value);
    const to = {ArrowRight: value + 1, ArrowLeft: value - 1, Home: 0, End: Number(slider.max)}[event.key];
    if (to !== undefined) move(to);
    else if (event.key === " " && !event.target.closest("button")) play.click();
    else return;
    event.preventDefault();
  });

  function told(panel, position) {
    const {trace, cells} = panel, cell = cells[position], lines = [];
    if (cell.token === null) lines.push(cell.kind === MASK ? `taken back in step ${cell.step}` : "masked");
    else if (cell.kind === FILL) lines.push(`end of text, filled in after step ${cell.step}`);
    else if (cell.step === 0) lines.push(`${JSON.stringify(piece(trace, cell.token))}, given`);
    else {
      const how = {edit: "changed", confirm: "decided again"}[kinds[cell.kind]] ?? "decided";
      lines.push(`${JSON.stringify(piece(trace, cell.token))} (id ${cell.token})`, `${how} in step ${cell.step}`);
      lines.push(cell.sure === null ? "confidence not known" : `confidence ${cell.sure.toFixed(4)}`);
    }
    const before = [];
    trace.frames.slice(0, Math.max(0, cell.step - 1)).forEach((frame, index) => {
      for (const [place, kind, token] of frame.changes)
        if (place === position) before.push(`step ${index + 1}: ${kind === MASK ? "taken back" : JSON.stringify(piece(trace, token))}`);
    });
    lines.push(`position ${position}`);
    if (before.length) lines.push("before:", ...before.slice(-6));
    return lines.join("\n");
  }

  panels.forEach(panel => {
    const tokens = panel.root.querySelector(".tokens");
    tokens.addEventListener("pointermove", event => {
      const place = event.target.dataset?.position;
      tip.hidden = place === undefined;
      if (tip.hidden) return;
      tip.textContent = told(panel, Number(place));
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8)}px`;
    });
    tokens.addEventListener("pointerleave", () => { tip.hidden = true; });
    panel.root.querySelector("svg")?.addEventListener("click", event => {
      const box = event.currentTarget.getBoundingClientRect(), {top, high} = panel.cursor.dataset;
      const y = (event.clientY - box.top) * event.currentTarget.viewBox.baseVal.height / box.height;
      const step = Math.max(1, Math.min(panel.trace.frames.length, Math.ceil((y - top) / high)));
      move(clock.value === "step" ? step : panel.trace.frames[step - 1].forwards);
    });
    // For readers who do not see colours: every token in a table, made when it is asked for.
    const list = panel.root.querySelector("details.list");
    list.addEventListener("toggle", () => {
      const body = list.querySelector("tbody");
      if (!list.open || body.rows.length) return;
      panel.last.forEach((cell, position) => {
        if (cell.token === null || cell.kind === FILL) return;
        const row = body.insertRow();
        const texts = [position, visible(piece(panel.trace, cell.token)), cell.step || "given", cell.sure === null ? "" : cell.sure.toFixed(4), cell.kind === null ? "" : kinds[cell.kind]];
        texts.forEach((text, column) => {
          const item = row.insertCell();
          item.textContent = text;
          if (column === 1) item.className = "text";
        });
      });
    });
  });
  read();
})();
