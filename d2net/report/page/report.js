"use strict";
// The figures are Bokeh's and empty; this puts one recording into them and lets clicks play its video.
const d2net = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const items = JSON.parse(document.getElementById("items").textContent);
  const at = (id) => document.getElementById(id);
  const player = at("player");
  const COLOURS = JSON.parse(at("recordings-section")?.dataset.colours ?? "[]");
  const LANE = 66;
  let model, recording, found, until = null;

  const unpack = (text) => Array.from(atob(text), (c) => c.charCodeAt(0) / 255);
  const span = (d) => `${d[0].toFixed(2)} – ${d[1].toFixed(2)}`;

  function show(index) {
    recording = data.recordings[index];
    at("recording").value = index;
    const n = recording.classes.length, end = recording.end;
    model("time").setv({ start: 0, end, bounds: [0, end], reset_start: 0, reset_end: end });
    model("lanes").end = Math.max(n, 1);
    model("top").height = Math.max(n, 1) * LANE + 12;
    const rows = recording.classes.map((_, i) => n - 1 - i), colours = COLOURS.slice(0, n);
    model("names").data = { y: rows.map((y) => y + 0.97), text: recording.classes, color: colours };
    model("floors").data = { y: rows, color: colours };
    const t = recording.truth;
    model("truth").data = {
      left: t.map((d) => d[0]), right: t.map((d) => d[1]), label: t.map((d) => recording.classes[d[2]]), span: t.map(span),
      bottom: t.map((d) => rows[d[2]] + 0.56), top: t.map((d) => rows[d[2]] + 0.7),
    };
    if (model("points")) {
      const curves = [...recording.curves, ...recording.attention].map((text) => text && unpack(text));
      const points = Math.max(0, ...curves.map((c) => c?.length ?? 0)), step = (recording.to - recording.from) / points;
      const curve = (c) => c ?? Array(points).fill(NaN);
      const filled = { x: Array.from({ length: points }, (_, i) => recording.from + (i + 0.5) * step) };
      COLOURS.forEach((_, i) => { filled[`c${i}`] = curve(i < n ? curves[i] : null); });
      model("points").data = { ...filled, down: curve(curves[n]), up: curve(curves[n + 1]) };
    }
    at("notes").textContent = recording.notes.join("; ");
    if (player) {
      player.hidden = !recording.video;
      at("player-note").hidden = true;
      until = null;
      player.src = recording.video ?? "";
      if (!recording.video) player.removeAttribute("src");
      move(0);
    }
    fill();
  }

  // The detections from the score that the slider says.
  function fill() {
    const least = Number(at("least").value), best = data.best, n = recording.classes.length;
    const share = (d) => (best > 0 ? Math.max(d[3] / best, 0) : 1);
    found = recording.found.filter((d) => best <= 0 || least === 0 || share(d) >= least);
    const floor = found.map((d) => n - 1 - d[2] + 0.04), verdict = (d) => (d[4] === null ? "–" : data.verdicts[d[4]]);
    model("found").data = {
      left: found.map((d) => d[0]), right: found.map((d) => d[1]), bottom: floor,
      top: found.map((d, i) => floor[i] + 0.07 + 0.39 * share(d)), shade: found.map((d) => 0.15 + 0.7 * share(d)),
      color: found.map((d) => COLOURS[d[2]]), label: found.map((d) => recording.classes[d[2]]),
      span: found.map(span), score: found.map((d) => d[3]), verdict: found.map(verdict),
    };
    at("least-shown").textContent = `${Math.round(100 * least)} % of the best: ${found.length} of ${recording.found.length}`;
    document.querySelector(".list").hidden = found.length === 0;
    at("list").replaceChildren(...found.map((d, i) => {
      const row = document.createElement("tr");
      const texts = ["", span(d), d[3].toPrecision(3), ...(document.querySelector(".list th:nth-child(4)") ? [verdict(d)] : [])];
      row.append(...texts.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: recording.classes[d[2]] });
      const dot = document.createElement("i");
      dot.style.background = COLOURS[d[2]];
      row.firstChild.append(dot, button);
      row.onclick = () => choose(i);
      return row;
    }));
    choose(null);
  }

  // Mark a detection, and play it where there is a video.
  function choose(i) {
    model("found").selected.indices = i === null ? [] : [i];
    [...at("list").children].forEach((row, k) => row.classList.toggle("chosen", k === i));
    if (i === null) return;
    const row = at("list").children[i], list = row.closest(".list");
    if (row.offsetTop < list.scrollTop + 30 || row.offsetTop + 60 > list.scrollTop + list.clientHeight) list.scrollTop = row.offsetTop - 60;
    play(found[i][0], found[i][1]);
  }

  function play(start, end) {
    if (!player || !recording.video) return;
    until = end;
    player.currentTime = start;
    move(start);
    player.play().catch(() => {});
  }

  function move(seconds) {
    for (const each of model.all("playhead")) each.setv({ location: seconds, visible: Boolean(recording.video) });
  }

  // A click at a moment, in a figure: the topmost detection there, or the moment itself.
  function tap(x, y, figure) {
    const near = (3 * (model("time").end - model("time").start)) / model("top").inner_width, box = model("found").data;
    const inside = (_, i) => x >= box.left[i] - near && x <= box.right[i] + near && y >= box.bottom[i] && y <= box.top[i];
    const i = figure === "top" ? found.findLastIndex(inside) : -1;
    choose(i < 0 ? null : i);
    if (i < 0) play(Math.max(0, x), null);
  }

  function list() {
    const words = (at("filter")?.value ?? "").toLowerCase().split(/\s+/);
    const options = data.recordings.map((r, i) => new Option(`${r.name}  ·  ${r.classes.join(", ")}`, i));
    const fits = options.filter((o) => words.every((w) => o.text.toLowerCase().includes(w)));
    at("filter")?.toggleAttribute("aria-invalid", fits.length === 0);
    at("recording").replaceChildren(...(fits.length ? fits : options));
    return fits;
  }

  async function start() {
    for (const [id, item] of Object.entries(items)) await Bokeh.embed.embed_item(item, id);
    if (!items.timeline) return;
    const figures = Bokeh.documents[Object.keys(items).indexOf("timeline")];
    model = (name) => figures.get_model_by_name(name);
    model.all = (name) => [...figures.all_models].filter((m) => m.name === name);
    list();
    const step = (by) => {
      const all = [...at("recording").options].map((o) => Number(o.value));
      const next = all[all.indexOf(data.recordings.indexOf(recording)) + by];
      if (next !== undefined) show(next);
    };
    for (const [id, by] of [["previous", -1], ["next", 1]]) at(id).onclick = () => step(by);
    at("recording").onchange = (event) => show(Number(event.target.value));
    at("least").oninput = fill;
    if (at("filter")) at("filter").oninput = () => { const [one] = list(); show(one ? Number(one.value) : data.recordings.indexOf(recording)); };
    if (player) {
      player.ontimeupdate = () => { move(player.currentTime); if (until !== null && player.currentTime >= until) { player.pause(); until = null; } };
      player.onerror = () => { if (recording.video) at("player-note").hidden = false; };
    }
    if (matchMedia("(pointer: coarse)").matches) for (const bar of model.all(null)) if (bar.type === "PanTool") bar.active = false;
    show(data.first);
    document.body.dataset.ready = "yes";
  }

  start();
  return { tap };
})();
