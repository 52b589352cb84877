(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  // An element with children, which are elements or text; text is never read as HTML.
  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const svgNode = (name, attributes) => {
    const element = document.createElementNS("http:" + "//www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const write = (value) => value === null || value === undefined ? "none" : String(value).replace("-", "−");

  const line = (name, value, colour) => {
    const label = make("span", {}, name);
    if (colour) label.style.borderLeft = `3px solid var(--${colour})`;
    return make("div", {}, label, make("b", {}, value));
  };
  const show = (x, y, title, rows) => {
    tip.replaceChildren(make("strong", {}, title), ...rows);
    tip.hidden = false;
    const left = x + 16 + tip.offsetWidth > innerWidth ? x - 16 - tip.offsetWidth : x + 16;
    const top = y + 16 + tip.offsetHeight > innerHeight ? y - 16 - tip.offsetHeight : y + 16;
    tip.style.left = `${Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  };
  const hide = () => { tip.hidden = true; };

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    const names = chart.at.split("|");
    const rows = chart.rows.map(([name, colour, values]) => [name, colour, values.split("|")]);
    const cross = svg.querySelector(".cross");
    let index = -1;
    const at = (next, x, y) => {
      index = next;
      cross.classList.add("on");
      cross.setAttribute("x1", chart.x[index]);
      cross.setAttribute("x2", chart.x[index]);
      show(x, y, `${chart.label} ${names[index]}`, rows.map(([name, colour, values]) => line(name, values[index] || "none", colour)));
    };
    const leave = () => { cross.classList.remove("on"); hide(); };
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      let best = 0;
      chart.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(chart.x[best] - x)) best = i; });
      at(best, event.clientX, event.clientY);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const box = svg.getBoundingClientRect();
      const next = Math.min(chart.x.length - 1, Math.max(0, index + move));
      at(next, box.left + chart.x[next] * box.width / svg.viewBox.baseVal.width, box.top);
    });
  }

  for (const mark of document.querySelectorAll(".about")) {
    const explain = () => {
      const box = mark.getBoundingClientRect();
      show(box.left, box.bottom - 10, mark.parentElement.firstChild.textContent.trim(), mark.dataset.about.split("\n").map((text) => make("p", {}, text)));
    };
    mark.addEventListener("pointerenter", explain);
    mark.addEventListener("focus", explain);
    mark.addEventListener("click", explain);
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("blur", hide);
  }

  // A list shown in pages, narrowed by search and selects. `items` gives what there is under the switch's choice, `text` what is searched.
  const paged = (picker, perPage, { items, text, keep, draw }) => {
    const search = picker.querySelector("input");
    const selects = [...picker.querySelectorAll("select")];
    const moves = [...picker.querySelectorAll("[data-move]")];
    const count = picker.querySelector(".count");
    const switches = [...picker.querySelectorAll("[data-choice]")];
    let page = 0;
    const update = () => {
      const choice = switches.find((one) => one.getAttribute("aria-pressed") === "true").dataset.choice;
      const words = search.value.trim().toLowerCase();
      const all = items(choice);
      const found = all.filter((item) => keep(item, selects.map((one) => one.value)) && (!words || text(item).includes(words)));
      const pages = Math.max(1, Math.ceil(found.length / perPage));
      page = Math.min(Math.max(0, page), pages - 1);
      count.textContent = `page ${page + 1} of ${pages} · ${found.length} of ${all.length}`;
      moves[0].disabled = page === 0;
      moves[1].disabled = page === pages - 1;
      hide();
      draw(found.slice(page * perPage, (page + 1) * perPage), choice);
    };
    const restart = () => { page = 0; update(); };
    search.addEventListener("input", restart);
    selects.forEach((one) => one.addEventListener("change", restart));
    moves.forEach((one) => one.addEventListener("click", () => { page += Number(one.dataset.move); update(); }));
    switches.forEach((one) => one.addEventListener("click", () => {
      switches.forEach((other) => other.setAttribute("aria-pressed", String(other === one)));
      update();
    }));
    update();
  };
  // Built once for each item, when it is first searched.
  const searched = (build) => {
    const texts = new WeakMap();
    return (item) => {
      if (!texts.has(item)) texts.set(item, build(item).join("\n").toLowerCase());
      return texts.get(item);
    };
  };
  const several = data.runs.length > 1;
  const swatch = (run) => make("i", { class: "swatch", style: `--c:var(--${data.runs[run].colour})` });
  const block = (text) => make("pre", {}, text || make("span", { class: "empty" }, "(empty)"));
  const verdict = (reward) => reward > 0 ? make("span", { class: "ok" }, "✓ accepted") : make("span", { class: "no" }, "✗ rejected");
  const joined = (...parts) => parts.flatMap((part, i) => i ? [" · ", part] : [part]);
  const solution = (text) => make("details", {}, make("summary", {}, "Reference solution (what the teacher may see)"), block(text));
  const seen = (item) => item.seen ? [make("details", {}, make("summary", {}, `What the teacher saw (${item.source})`), block(item.seen))] : [];

  const groupsPicker = document.getElementById("groups-picker");
  if (groupsPicker) {
    const body = document.querySelector("#groups-table tbody");
    const columns = document.querySelectorAll("#groups-table th").length;
    const samples = (group) => {
      const shown = group.samples.map((sample) => make("div", {},
        make("div", { class: "tag" }, ...joined(verdict(sample.reward), `reward ${write(sample.reward)}`, `answer ${sample.answer || "none"}`, `ended by ${sample.end}`)),
        block(sample.text), ...seen(sample)));
      const more = group.count > shown.length ? [make("p", { class: "small" }, `The first ${shown.length} of ${group.count} rollouts of this group.`)] : [];
      return make("td", { class: "samples", colspan: columns },
        make("div", { class: "tag" }, "Problem, expected ", make("b", {}, group.expected || "none")), block(group.problem),
        ...(group.solution ? [solution(group.solution)] : []), make("div", { class: "columns" }, ...shown), ...more);
    };
    paged(groupsPicker, 10, {
      items: (choice) => data.groups[choice],
      text: searched((group) => [group.problem, group.expected, group.solution, ...group.samples.map((sample) => `${sample.text}\n${sample.answer}\n${sample.seen || ""}`)]),
      keep: () => true,
      draw: (groups) => {
        body.replaceChildren(...groups.flatMap((group) => {
          const right = group.rewards.filter((reward) => reward > 0).length;
          const mean = group.rewards.reduce((sum, reward) => sum + reward, 0) / group.rewards.length;
          const button = make("button", { type: "button", "aria-expanded": "false" }, "samples");
          const cells = [String(group.step), null, write(Number(mean.toPrecision(3))), `${right} of ${group.rewards.length}`, (group.tokens / group.count).toFixed(1), String(group.cut)];
          const short = group.problem.length > 90 ? `${group.problem.slice(0, 90)}…` : group.problem;
          const row = make("tr", {},
            ...(several ? [make("td", { class: "text" }, swatch(group.run), data.runs[group.run].label)] : []),
            ...cells.map((cell) => cell === null ? make("td", { class: "text" }, short) : make("td", {}, cell)), make("td", {}, button));
          const detail = make("tr", { hidden: "" });
          button.addEventListener("click", () => {
            if (!detail.firstChild) detail.append(samples(group));
            detail.hidden = !detail.hidden;
            button.setAttribute("aria-expanded", String(!detail.hidden));
          });
          return [row, detail];
        }));
        if (!groups.length) body.append(make("tr", {}, make("td", { class: "text none", colspan: columns }, "No group matches.")));
      },
    });
  }

  const rolloutsPicker = document.getElementById("rollouts-picker");
  if (rolloutsPicker) {
    const names = [["h", "student entropy H, nats"], ["d", "gap δ = log q − log p, nats"], ["w", "direction weight ω"], ["a", "advantage A"], ["p", "student probability p"], ["q", "teacher probability q"]];
    const scales = { w: ["push, ω ≤ −", "pull, ω ≥ "], h: ["certain, 0", "uncertain, H ≥ "], d: ["less likely, δ ≤ −", "likelier, δ ≥ "], a: ["discouraged, A ≤ −", "encouraged, A ≥ "] };
    const level = (value, choice) => {
      const size = value === "NaN" || value === null ? 0 : typeof value === "string" ? 10 : Math.min(10, Math.ceil(10 * Math.abs(value) / data.limits[choice] - 1e-9));
      return !size ? "" : (choice === "h" ? "u" : value < 0 || value === "−∞" ? "s" : "l") + size;
    };
    const token = (rollout, i, choice) => {
      const element = make("i", { class: level(rollout[choice][i], choice), "data-i": i });
      rollout.t[i].split(/(\n|\t)/).forEach((part) => {
        if (part === "\n" || part === "\t") element.append(make("b", {}, part === "\n" ? "⏎" : "⇥"));
        element.append(part);
      });
      return element;
    };
    const entropy = (rollout) => {
      const finite = rollout.h.filter((value) => typeof value === "number");
      const routed = data.routed[rollout.run] && typeof rollout.tau === "number";
      const top = Math.max(...finite, routed ? rollout.tau : 0) || 1;
      const x = (i) => (rollout.h.length > 1 ? 480 * i / (rollout.h.length - 1) : 240).toFixed(1);
      const y = (value) => (86 - 82 * value / top).toFixed(1);
      const svg = svgNode("svg", { viewBox: "0 0 480 90", preserveAspectRatio: "none", role: "img", "aria-label": "Entropy along the rollout" });
      if (routed) svg.append(svgNode("line", { class: "level", x1: 0, x2: 480, y1: y(rollout.tau), y2: y(rollout.tau) }));
      const d = rollout.h.map((value, i) => typeof value === "number" ? `${i && typeof rollout.h[i - 1] === "number" ? "L" : "M"}${x(i)} ${y(value)}` : "").join("");
      svg.append(svgNode("path", { class: "curve", style: "stroke:var(--ink)", "vector-effect": "non-scaling-stroke", d }));
      const text = `Entropy H along the rollout, from 0 to ${write(Number(top.toPrecision(3)))} nats.` + (routed ? ` Dashed: τ; tokens above it are pushed away from the teacher, tokens below are pulled toward it.` : "");
      return [svg, make("p", { class: "small" }, text)];
    };
    const article = (rollout, choice) => {
      const tokens = make("div", { class: "tokens" }, ...rollout.t.map((_, i) => token(rollout, i, choice)));
      const over = (event) => {
        const element = event.target.closest("i[data-i]");
        if (!element) { hide(); return; }
        const i = Number(element.dataset.i), weight = rollout.w[i];
        const direction = weight < 0 ? "pushed away" : weight > 0 ? "pulled" : "untouched";
        show(event.clientX, event.clientY, `“${rollout.t[i]}” · ${direction}`, names.map(([key, name]) => line(name, write(rollout[key][i]))));
      };
      tokens.addEventListener("pointermove", over);
      tokens.addEventListener("pointerdown", over);
      tokens.addEventListener("pointerleave", hide);
      const pushed = rollout.w.filter((value) => value < 0).length / (rollout.w.length || 1);
      const numbers = [["τ", rollout.tau, " nats"], ["σ", rollout.sigma, " nats"], ["verifier advantage", rollout.advantage, ""], ["tokens", rollout.length, ""], ["pushed", (100 * pushed).toFixed(1), "%"]];
      const facts = [];
      if (rollout.reward !== null) facts.push(verdict(rollout.reward), `reward ${write(rollout.reward)}`);
      if (rollout.answer) facts.push(`answer ${rollout.answer}`);
      if (rollout.expected) facts.push(`expected ${rollout.expected}`);
      if (rollout.end) facts.push(`ended by ${rollout.end}`);
      const cut = rollout.t.length < rollout.length ? [make("p", { class: "small" }, `The first ${rollout.t.length} of ${rollout.length} tokens are shown.`)] : [];
      const whole = choice === "a" && !rollout.whole ? [make("p", { class: "small" }, "This run has not recorded the advantage of each token: this is the verifier's part, the same for all.")] : [];
      const title = make("h3", {}, ...(several ? [swatch(rollout.run), `${data.runs[rollout.run].label}, `] : []), `${several ? "step" : "Step"} ${rollout.step}, rollout ${rollout.place}`);
      return make("article", { class: "heat panel" }, title, make("div", { class: "tag" }, "Problem"), block(rollout.problem),
        make("div", { class: "tag" }, ...joined("Rollout", ...facts)), tokens, ...cut, ...whole,
        make("ul", { class: "numbers" }, ...numbers.filter(([, value]) => value !== null).map(([name, value, unit]) => make("li", {}, make("span", {}, name), write(value) + unit))),
        ...entropy(rollout), ...(rollout.solution ? [solution(rollout.solution)] : []), ...seen(rollout));
    };
    paged(rolloutsPicker, 5, {
      items: () => data.rollouts,
      text: searched((rollout) => [rollout.t.join(""), rollout.problem, rollout.answer, rollout.expected, rollout.solution, rollout.seen]),
      keep: (rollout, [accepted, run]) => (!accepted || (rollout.reward > 0) === (accepted === "yes")) && (!run || rollout.run === Number(run)),
      draw: (rollouts, choice) => {
        const limit = write(Number(data.limits[choice].toPrecision(3))), [low, high] = scales[choice];
        document.getElementById("scale-low").textContent = choice === "h" ? low : low + limit;
        document.getElementById("scale-high").textContent = high + limit;
        const levels = [...Array(10).keys()].map((i) => i + 1);
        const classes = choice === "h" ? ["", ...levels.map((i) => `u${i}`)] : [...levels.map((i) => `s${11 - i}`), "", ...levels.map((i) => `l${i}`)];
        document.getElementById("ramp").replaceChildren(...classes.map((name) => make("i", { class: name })));
        document.getElementById("rollouts").replaceChildren(...(rollouts.length ? rollouts.map((rollout) => article(rollout, choice)) : [make("p", { class: "none" }, "No rollout matches.")]));
      },
    });
  }
})();
