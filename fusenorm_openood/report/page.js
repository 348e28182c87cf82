"use strict";
// Lists of images: sort, filter, search and enlarge. Texts are set as text, never as HTML.
const make = (tag, fields = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
};
const { compare } = new Intl.Collator(undefined, { numeric: true });

for (const list of document.querySelectorAll(".list")) {
  const body = list.querySelector("tbody"), heads = [...list.querySelectorAll("thead th")];
  const names = heads.map((head) => head.textContent), dialog = list.querySelector("dialog");
  const items = new Map([...body.rows].map((row) => [row, {
    cells: [...row.cells].map((cell) => cell.textContent.trim()),
    text: `${row.textContent} ${row.querySelector("a")?.href ?? ""}`.toLowerCase(),
  }]));
  const visible = () => [...body.rows].filter((row) => !row.hidden);
  const select = (row) => { for (const other of items.keys()) other.tabIndex = other === row ? 0 : -1; };

  const search = make("input", { type: "search", placeholder: "any text of a row" });
  const choices = new Map(), count = make("output");
  const filter = () => {
    const text = search.value.trim().toLowerCase();
    for (const [row, item] of items) {
      row.hidden = !item.text.includes(text) || [...choices].some(([column, { selectedIndex, value }]) =>
        selectedIndex > 0 && item.cells[column] !== value);
    }
    count.textContent = `${visible().length} of ${items.size} images`;
    select(visible()[0]);
  };
  const sort = (column) => {
    const isDown = heads[column].ariaSort === "ascending";
    const cell = (row) => items.get(row).cells[column];
    const isNumber = [...items.keys()].every((row) => !isNaN(cell(row)));
    const order = (a, b) => isNumber ? cell(a) - cell(b) : compare(cell(a), cell(b));
    body.append(...[...body.rows].sort((a, b) => isDown ? order(b, a) : order(a, b)));
    for (const head of heads) head.ariaSort = null;
    heads[column].ariaSort = isDown ? "descending" : "ascending";
    select(visible()[0]);
  };
  const controls = make("div", { className: "controls" }, make("label", {}, "search", search));
  heads.forEach((head, column) => {
    if (!column) return; // the pictures
    head.replaceChildren(make("button", { type: "button", onclick: () => sort(column) }, names[column]));
    if (!("choose" in head.dataset)) return;
    const values = [...new Set([...items.values()].map((item) => item.cells[column]))].sort(compare);
    choices.set(column, make("select", { onchange: filter }, make("option", {}, "all"),
      ...values.map((value) => make("option", { value }, value || "none"))));
    controls.append(make("label", {}, names[column], choices.get(column)));
  });
  search.oninput = filter;
  count.ariaLive = "polite";
  controls.append(count);

  let open = null; // the row that is enlarged
  const show = (row) => {
    open = row;
    select(row);
    const { cells } = items.get(row), image = row.querySelector("img"), link = row.querySelector("a");
    dialog.firstElementChild.replaceChildren(
      image ? make("img", { src: image.src, alt: cells[1] }) : "There is no picture on this page.",
      make("p", { className: "name" }, link ? link.cloneNode(true) : cells[1]),
      make("dl", {}, ...names.flatMap((name, n) =>
        n > 1 ? [make("dt", {}, name), make("dd", {}, cells[n])] : [])));
    if (!dialog.open) dialog.showModal();
  };
  const step = (by) => show(visible()[visible().indexOf(open) + by] ?? open);
  const [previous, next, close] = dialog.querySelectorAll("button");
  previous.onclick = () => step(-1);
  next.onclick = () => step(1);
  close.onclick = () => dialog.close();
  dialog.onclose = () => open.focus();
  dialog.onkeydown = ({ key }) => { if (key.startsWith("Arrow")) step({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0); };
  body.onclick = ({ target }) => target.closest("a") || show(target.closest("tr"));
  body.onkeydown = (event) => {
    const rows = visible(), at = rows.indexOf(event.target);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (at < 0 || (to === undefined && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    if (to === undefined) return show(event.target);
    select(rows[to] ?? event.target);
    rows[to]?.focus();
  };
  list.querySelector(".scroll").before(controls);
  list.open = true;
  filter();
}
