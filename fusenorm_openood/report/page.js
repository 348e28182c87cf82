"use strict";
// Lists of images: sort, filter, search and enlarge. Texts are set as text, never as HTML.
const make = (tag, fields = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
};

for (const list of document.querySelectorAll(".list")) {
  const body = list.querySelector("tbody");
  const rows = [...body.rows].map((row) => ({
    row,
    cells: [...row.cells].map((cell) => cell.textContent.trim()),
    text: `${row.textContent} ${row.querySelector("a")?.href ?? ""}`.toLowerCase(),
  }));
  const of = new Map(rows.map((item) => [item.row, item]));
  const heads = [...list.querySelectorAll("thead th")];
  const names = heads.map((head) => head.textContent.trim());
  const search = make("input", { type: "search", placeholder: "any text of a row" });
  const count = make("output");
  const controls = make("div", { className: "controls" }, make("label", {}, "search", search));
  const choices = [];
  const visible = () => [...body.rows].filter((row) => !row.hidden);

  const current = (row) => {
    for (const { row: other } of rows) other.tabIndex = other === row ? 0 : -1;
  };
  const filter = () => {
    const text = search.value.trim().toLowerCase();
    const chosen = choices.filter(({ select }) => select.selectedIndex > 0);
    for (const { row, cells, text: whole } of rows) {
      row.hidden = !(whole.includes(text) &&
        chosen.every(({ select, column }) => cells[column] === select.value));
    }
    const shown = visible();
    count.textContent = `${shown.length} of ${rows.length} images`;
    current(shown[0]);
  };
  const sort = (column, down) => {
    const number = (item) => parseFloat(item.cells[column]);
    const isNumber = rows.every((item) => item.cells[column] === "" || !isNaN(number(item)));
    const order = new Intl.Collator(undefined, { numeric: true });
    const value = (item) => (item.cells[column] === "" ? Infinity : number(item));
    rows.sort((a, b) => (down ? -1 : 1) *
      (isNumber ? value(a) - value(b) || 0 : order.compare(a.cells[column], b.cells[column])));
    heads.forEach((head, n) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows.map((item) => item.row));
    current(visible()[0]);
  };

  heads.forEach((head, column) => {
    if (column === 0) return; // the pictures
    const button = make("button", { type: "button" }, names[column]);
    button.onclick = () => sort(column, head.getAttribute("aria-sort") === "ascending");
    head.replaceChildren(button);
    if (!("choose" in head.dataset)) return;
    const values = [...new Set(rows.map((item) => item.cells[column]))];
    values.sort(new Intl.Collator(undefined, { numeric: true }).compare);
    const all = make("option", { value: "" }, "all");
    const select = make("select", { onchange: filter }, all,
      ...values.map((value) => make("option", { value }, value || "none")));
    choices.push({ select, column });
    controls.append(make("label", {}, names[column], select));
  });
  search.oninput = filter;
  controls.append(count);
  count.setAttribute("aria-live", "polite");

  const dialog = list.querySelector("dialog");
  let open = null;
  const show = (row) => {
    open = row;
    current(row);
    const { cells } = of.get(row);
    const picture = row.querySelector("img");
    const link = row.querySelector("a");
    const facts = names.flatMap((name, n) =>
      n > 1 ? [make("dt", {}, name), make("dd", {}, cells[n])] : []);
    dialog.querySelector(".content").replaceChildren(
      picture ? make("img", { src: picture.src, alt: picture.alt }) : "There is no picture here.",
      make("p", { className: "name" }, link ? make("a", { href: link.href }, cells[1]) : cells[1]),
      make("dl", {}, ...facts));
    if (!dialog.open) dialog.showModal();
  };
  const step = (by) => {
    const shown = visible();
    show(shown[Math.min(Math.max(shown.indexOf(open) + by, 0), shown.length - 1)]);
  };
  const [before, after, close] = dialog.querySelectorAll("button");
  before.onclick = () => step(-1);
  after.onclick = () => step(1);
  close.onclick = () => dialog.close();
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.onclose = () => open.focus();
  dialog.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) step(by);
  };
  body.onclick = (event) => event.target.closest("a") || show(event.target.closest("tr"));
  body.onkeydown = (event) => {
    if (event.target.tagName !== "TR") return;
    const shown = visible();
    const at = shown.indexOf(event.target);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") show(event.target);
    else if (to === undefined) return;
    else if (shown[to]) { current(shown[to]); shown[to].focus(); }
    event.preventDefault();
  };
  list.querySelector(".scroll").before(controls);
  list.open = true;
  filter();
}
