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

  // The pointer over a line plot: the values of all lines at the nearest position.
  const tip = make("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
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
    const leave = () => { tip.hidden = true; cross.remove(); };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const at = (event.clientX - box.left) * plot.viewBox.baseVal.width / box.width;
      let best = 0;
      stops.forEach((stop, i) => { if (Math.abs(stop - at) < Math.abs(stops[best] - at)) best = i; });
      const lines = all("g[data-v]:not(.off)", plot).reverse()
        .map((line) => [line, line.dataset.v.split("|")[best]])
        .filter(([, value]) => value && value !== "–");
      if (!lines.length) return leave();
      cross.setAttribute("x1", stops[best]);
      cross.setAttribute("x2", stops[best]);
      plot.append(cross);
      tip.replaceChildren(make("b", names[best]), ...lines.map(([line, value]) => {
        const row = make("div", undefined, `n${line.dataset.n}`);
        row.append(make("i", undefined, "chip"), make("span", line.dataset.label), make("span", value));
        return row;
      }));
      tip.hidden = false;
      const x = event.clientX + 14 + tip.offsetWidth > document.documentElement.clientWidth
        ? event.clientX - tip.offsetWidth - 14 : event.clientX + 14;
      tip.style.left = `${Math.max(0, x) + scrollX}px`;
      tip.style.top = `${event.clientY + 14 + scrollY}px`;
    });
  }
})();
