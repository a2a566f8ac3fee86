"use strict";
// Values of the method that is pointed at or has the focus, commands to copy, a table to sort.

const values = document.getElementById("values");
for (const event of ["pointerover", "focusin"])
  document.addEventListener(event, ({ target }) => {
    const method = target.closest?.(".method");
    if (method) values.textContent = method.getAttribute("aria-label");
  });

for (const button of document.querySelectorAll(".copy")) {
  const code = button.previousElementSibling;
  button.hidden = false;
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(code);
    const copied = await navigator.clipboard?.writeText(code.textContent).then(() => true, () => false);
    button.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

const table = document.getElementById("methods"), heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  const compare = head.classList.contains("number") ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
  button.addEventListener("click", () => {
    const upward = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", upward ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].sort((first, second) => {
      const [a, b] = [first, second].map((row) => row.cells[column]?.dataset.value ?? "");
      if (a === "" || b === "") return (a === "") - (b === ""); // rows without a value come last
      return upward ? compare(a, b) : compare(b, a);
    });
    table.tBodies[0].append(...rows);
  });
});
