(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const row = (name, value, colour) => {
    const line = document.createElement("div");
    const label = document.createElement("span");
    label.textContent = name;
    if (colour) label.style.borderLeft = `3px solid var(--${colour})`;
    const number = document.createElement("b");
    number.textContent = value;
    line.append(label, number);
    return line;
  };
  const show = (x, y, title, rows) => {
    const head = document.createElement("strong");
    head.textContent = title;
    tip.replaceChildren(head, ...rows);
    tip.hidden = false;
    const left = x + 16 + tip.offsetWidth > innerWidth ? x - 16 - tip.offsetWidth : x + 16;
    const top = y + 16 + tip.offsetHeight > innerHeight ? y - 16 - tip.offsetHeight : y + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  };
  const hide = () => { tip.hidden = true; };

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const data = JSON.parse(svg.dataset.chart);
    const cross = svg.querySelector(".cross");
    let index = -1;
    const at = (next, x, y) => {
      index = next;
      cross.classList.add("on");
      cross.setAttribute("x1", data.x[index]);
      cross.setAttribute("x2", data.x[index]);
      show(x, y, data.at[index], data.rows.map(([name, colour, values]) => row(name, values[index] ?? "none", colour)));
    };
    const leave = () => { cross.classList.remove("on"); hide(); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      let best = 0;
      data.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(data.x[best] - x)) best = i; });
      at(best, event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const box = svg.getBoundingClientRect();
      const next = Math.min(data.x.length - 1, Math.max(0, index + move));
      at(next, box.left + data.x[next] * box.width / svg.viewBox.baseVal.width, box.top);
    });
  }

  const names = ["student entropy H, nats", "gap δ = log q − log p, nats", "direction weight ω", "student probability p", "teacher probability q"];
  for (const panel of document.querySelectorAll(".tokens")) {
    const over = (event) => {
      const token = event.target.closest("i[data-v]");
      if (!token) { hide(); return; }
      const values = token.dataset.v.split("|");
      const direction = values[2].startsWith("−") ? "pushed away" : Number(values[2]) > 0 ? "pulled" : "untouched";
      show(event.clientX, event.clientY, `“${token.textContent}” · ${direction}`, names.map((name, i) => row(name, values[i] || "none")));
    };
    panel.addEventListener("pointermove", over);
    panel.addEventListener("click", over);
    panel.addEventListener("pointerleave", hide);
  }

  const select = document.getElementById("heat-select");
  if (select) {
    const panels = [...document.querySelectorAll(".heat")];
    const update = () => panels.forEach((panel, i) => { panel.hidden = i !== select.selectedIndex; });
    const move = (by) => { select.selectedIndex = (select.selectedIndex + by + panels.length) % panels.length; update(); };
    select.addEventListener("change", update);
    document.getElementById("heat-previous").addEventListener("click", () => move(-1));
    document.getElementById("heat-next").addEventListener("click", () => move(1));
    update();
  }
})();
