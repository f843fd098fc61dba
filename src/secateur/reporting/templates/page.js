"use strict";
(() => {
  const style = getComputedStyle(document.documentElement);
  const figures = JSON.parse(document.getElementById("figures").textContent);

  // Colours and fonts in figures are names of the page's style.
  const styled = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.map(styled);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, styled(inner)]));
  };

  const draw = () => {
    for (const [name, figure] of Object.entries(figures)) {
      const options = { displayModeBar: false, responsive: true };
      Plotly.react(`plot-${name}`, styled(figure.data), styled(figure.layout), options);
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const read = (row, column) => {
    const text = row.cells[column].dataset.value;
    if (text === undefined) return null;
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };

  // What is missing stays at the end, whichever way is sorted.
  const compare = (one, other, sign) => {
    if (one === null || other === null) return (one === null) - (other === null);
    if (typeof one === "number" && typeof other === "number") return sign * (one - other);
    return sign * String(one).localeCompare(String(other), undefined, { numeric: true });
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => {
        const ascending = heading.getAttribute("aria-sort") !== "ascending";
        for (const one of headings) one.setAttribute("aria-sort", "none");
        heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const body = table.tBodies[0];
        const sign = ascending ? 1 : -1;
        body.append(...[...body.rows].sort((a, b) => compare(read(a, column), read(b, column), sign)));
      });
    });
  }
})();
