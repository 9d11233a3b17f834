"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("numbers").textContent);
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map(); // from a place for a chart to its Vega view
  const position = DATA.runs.map((run) => run.steps.length - 1);
  const shown = DATA.runs.map(() => "rank");
  const projection = DATA.runs.map((run) => Object.keys(run.heads)[0]);
  let chosen = null; // "light" or "dark", once the reader has chosen
  let printing = false;

  const theme = () => (printing ? "light" : chosen ?? (system.matches ? "dark" : "light"));

  const signed = (change) => (change > 0 ? `+${change}` : change < 0 ? `−${-change}` : "0");

  function moduleRows(run, frame) {
    return run.cells.map(([block, column, module, reference], index) => {
      const rank = run.ranks[frame][index];
      return { block, projection: column, module, rank, change: rank - reference, signed: signed(rank - reference) };
    });
  }

  function headRows(heads, frame) {
    const ranks = heads.ranks[frame];
    return heads.cells.map(([block, head], index) => {
      const rank = ranks === null ? null : ranks[index];
      return { block, projection: head, module: `block ${block}, head ${head}`, rank, change: 0, signed: "" };
    });
  }

  const rows = (place) => {
    const number = Number(place.dataset.run);
    const run = DATA.runs[number];
    return place.dataset.map === "modules"
      ? moduleRows(run, position[number])
      : headRows(run.heads[projection[number]], position[number]);
  };

  function specOf(place) {
    if (place.dataset.comparison !== undefined) {
      return DATA.comparisons[Number(place.dataset.comparison)][Number(place.dataset.index)];
    }
    const number = Number(place.dataset.run);
    const run = DATA.runs[number];
    if (place.dataset.map === "modules") return run.maps[shown[number]];
    if (place.dataset.map === "heads") return run.heads[projection[number]].map;
    return run.specs[place.dataset.spec];
  }

  async function draw(place) {
    if (place.offsetParent === null) return; // in a closed part of the page, where it has no width
    const turn = (place.turn ?? 0) + 1; // a later call overtakes an earlier one
    place.turn = turn;
    const spec = JSON.parse(JSON.stringify(specOf(place)));
    spec.config = DATA.themes[theme()];
    if (place.dataset.map) spec.data.values = rows(place); // from the start, because the labels' sizes come from them
    const holder = document.createElement("div");
    holder.className = "holder";
    const old = views.get(place);
    place.append(holder);
    holder.style.width = "100%";
    // expressions are interpreted (ast), so the page needs no permission to make code out of text
    const result = await vegaEmbed(holder, spec, { actions: false, renderer: "svg", ast: true, tooltip: { theme: theme() } });
    if (place.turn !== turn) {
      result.finalize();
      holder.remove();
      return;
    }
    if (old) old.finalize();
    for (const child of [...place.children]) if (child !== holder) child.remove();
    views.set(place, result);
    await update(place);
  }

  async function update(place) {
    const result = views.get(place);
    if (!result) return;
    const number = Number(place.dataset.run);
    if (place.dataset.map) {
      result.view.data("cells", rows(place));
    } else if (place.dataset.spec === "loss" || place.dataset.spec === "size") {
      result.view.signal("shown", DATA.runs[number].steps.length > 1 ? DATA.runs[number].steps[position[number]] : -1);
    } else {
      return;
    }
    await result.view.runAsync();
    place.dataset.drawn = String(position[number] ?? ""); // for tests, and for nobody else
  }

  const placesOf = (number) => document.querySelectorAll(`.chart[data-run="${number}"]`);

  function say(number) {
    const run = DATA.runs[number];
    const at = position[number];
    const size = run.parameters[at] ? `, ${run.parameters[at].toLocaleString("en")} LoRA parameters` : "";
    const text = `step ${run.steps[at].toLocaleString("en")}: ${run.totals[at].toLocaleString("en")} ranks${size}`;
    const controls = document.querySelector(`.controls[data-run="${number}"]`);
    controls.querySelector(".where").textContent = text;
    controls.querySelector(".step")?.setAttribute("aria-valuetext", text);
  }

  function drawAll() {
    return Promise.all([...document.querySelectorAll(".chart")].map(draw));
  }

  async function showTheme() {
    delete root.dataset.ready; // for tests, which wait for the pictures
    if (chosen) root.dataset.theme = chosen;
    button.setAttribute("aria-pressed", String(theme() === "dark"));
    await drawAll();
    root.dataset.ready = "yes";
  }

  for (const controls of document.querySelectorAll(".controls")) {
    const number = Number(controls.dataset.run);
    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.querySelector(".step")?.addEventListener("input", (event) => {
      position[number] = Number(event.target.value);
      say(number);
      placesOf(number).forEach(update);
    });
    for (const radio of controls.querySelectorAll("[name=shown]")) {
      radio.addEventListener("change", () => {
        shown[number] = radio.value;
        placesOf(number).forEach((place) => place.dataset.map === "modules" && draw(place));
      });
    }
    say(number);
  }
  for (const select of document.querySelectorAll(".projection")) {
    const number = Number(select.dataset.run);
    select.addEventListener("change", () => {
      projection[number] = select.value;
      placesOf(number).forEach((place) => place.dataset.map === "heads" && draw(place));
    });
  }
  for (const part of document.querySelectorAll("details.run, details.heads")) {
    part.addEventListener("toggle", () => {
      if (part.open) part.querySelectorAll(".chart").forEach((place) => views.has(place) || draw(place));
    });
  }
  const follow = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.matches("details.run")) target.open = true;
  };
  window.addEventListener("hashchange", follow);
  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    showTheme();
  });
  system.addEventListener("change", showTheme);
  window.addEventListener("beforeprint", () => {
    printing = true;
    document.querySelectorAll("details.run").forEach((part) => (part.open = true));
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    drawAll();
  });
  follow();
  showTheme();
})();
