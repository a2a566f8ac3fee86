// Sorting: the heads become buttons; rows without a value stay at the end whichever way it goes.

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = html("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const upward = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", upward ? "ascending" : "descending");
      body.append(...sorted([...body.rows], column, upward, head.classList.contains("number")));
    });
  });
}

function sorted(rows, column, upward, numeric) {
  const valueOf = (row) => row.cells[column]?.dataset.value ?? "";
  const order = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
  return rows.sort((first, second) => {
    const [a, b] = [valueOf(first), valueOf(second)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return upward ? order(a, b) : order(b, a);
  });
}
