const key = (row, i) => {
  const cell = row.cells[i];
  if (cell.classList.contains("number"))
    return "value" in cell.dataset ? Number(cell.dataset.value) : NaN;
  return cell.textContent;
};
const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true});
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map(row => [key(row, i), row]);
    const unknown = rows.filter(([k]) => Number.isNaN(k));
    const known = rows.filter(([k]) => !Number.isNaN(k));
    known.sort(([a], [b]) => sign * compare(a, b));
    body.append(...[...known, ...unknown].map(([, row]) => row));
  }));
}
