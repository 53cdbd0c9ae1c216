"use strict";
(() => {
  const all = (query, root) => Array.from((root || document).querySelectorAll(query));
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  };

  // The legend: a click hides a normalizer everywhere.
  for (const key of all(".key[data-n]")) {
    const button = make("button", undefined, key.className);
    button.type = "button";
    button.title = "Show or hide in every figure";
    button.setAttribute("aria-pressed", "true");
    button.append(...key.childNodes);
    key.replaceWith(button);
    button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!off));
      for (const mark of all(`[data-n="${key.dataset.n}"]:not(.key)`)) mark.classList.toggle("off", off);
    });
  }

  // The table: a click on a column's name sorts by it; empty cells stay last.
  for (const table of all("table.results")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const label = head.querySelector(".th");
      const button = make("button", label.textContent);
      button.type = "button";
      label.replaceChildren(button);
      const words = head.classList.contains("name");
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const up = before ? before === "descending" : words;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const body = table.tBodies[0];
        const value = (row) => row.cells[column].dataset.v;
        const rows = Array.from(body.rows).sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (!x || !y) return Number(!x) - Number(!y);
          const order = words ? x.localeCompare(y) : parseFloat(x) - parseFloat(y);
          return up ? order : -order;
        });
        body.append(...rows);
      });
    });
  }

  // Copying of command and configuration.
  for (const block of all(".code")) {
    const button = make("button", "Copy", "copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      const pre = block.querySelector("pre");
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(pre);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    block.append(button);
  }

  // The pointer or the arrow keys on a line chart: the values of all lines at the nearest position.
  const tip = make("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.append(tip);
  for (const plot of all("svg[data-x]")) {
    const stops = plot.dataset.x.split(" ").filter(Boolean).map(Number);
    if (!stops.length) continue;
    const names = plot.dataset.at.split("|");
    const [top, bottom] = plot.dataset.box.split(" ");
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", top);
    cross.setAttribute("y2", bottom);
    let shown = -1;
    const leave = () => { tip.hidden = true; cross.remove(); };
    const show = (index, left, down) => {
      const lines = all("g[data-v]:not(.off)", plot).reverse()
        .map((line) => [line, line.dataset.v.split("|")[index]])
        .filter(([, value]) => value && value !== "–");
      if (!lines.length) return leave();
      shown = index;
      cross.setAttribute("x1", stops[index]);
      cross.setAttribute("x2", stops[index]);
      plot.append(cross);
      tip.replaceChildren(make("b", names[index]), ...lines.map(([line, value]) => {
        const row = make("div", undefined, `n${line.dataset.n}`);
        row.append(make("i", undefined, "chip"), make("span", line.dataset.label), make("span", value));
        return row;
      }));
      tip.hidden = false;
      const x = left + 14 + tip.offsetWidth > document.documentElement.clientWidth
        ? left - tip.offsetWidth - 14 : left + 14;
      tip.style.left = `${Math.max(0, x) + scrollX}px`;
      tip.style.top = `${down + 14 + scrollY}px`;
    };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const at = (event.clientX - box.left) * plot.viewBox.baseVal.width / box.width;
      let best = 0;
      stops.forEach((stop, i) => { if (Math.abs(stop - at) < Math.abs(stops[best] - at)) best = i; });
      show(best, event.clientX, event.clientY);
    });
    plot.tabIndex = 0;
    plot.addEventListener("blur", leave);
    plot.addEventListener("keydown", (event) => {
      const last = stops.length - 1;
      const next = { ArrowRight: shown + 1, ArrowLeft: shown < 0 ? last : shown - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") leave();
      if (next === undefined) return;
      event.preventDefault();
      const box = plot.getBoundingClientRect();
      const index = Math.min(Math.max(next, 0), last);
      show(index, box.left + stops[index] * box.width / plot.viewBox.baseVal.width, box.top + box.height / 3);
    });
  }

  // Every chart as a file of its own: with the page's styles, in the page's colours.
  for (const plot of all("svg.plot")) {
    const [box, button] = [make("div", undefined, "chart"), make("button", "SVG", "save")];
    button.type = "button";
    button.title = "Save this chart as a file";
    button.setAttribute("aria-label", `Save as SVG: ${plot.querySelector("title").textContent}`);
    button.addEventListener("click", () => {
      const copy = plot.cloneNode(true);
      all(".cross", copy).forEach((cross) => cross.remove());
      const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
      style.textContent = document.querySelector("style").textContent;
      copy.prepend(style);
      const link = make("a");
      link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
      link.download = `${plot.querySelector("title").textContent}.svg`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    plot.replaceWith(box);
    box.append(plot, button);
  }
})();
