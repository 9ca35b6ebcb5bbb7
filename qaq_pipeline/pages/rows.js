// The table of the row browser: DataTables fetches the rows that are shown. The order and the first row are kept in
// the address, so that a reload or a step back shows the same rows.
import DataTable, { set_or_remove_dark_class } from "./dt_bundle.js";

set_or_remove_dark_class();
const table = document.querySelector("#rows");
const failed = document.querySelector("#failed");
const names = [...table.querySelectorAll("th")].map((head) => head.dataset.name);
const numbers = new Set(table.dataset.numbers.split(" "));
const texts = new Set(["query", "answer"]);
const asked = new URLSearchParams(location.search);

function shown(value, type) {
  if (type !== "display" || value === null) return value;
  const element = document.createElement("div");
  element.className = "shown";
  element.dir = "auto";
  element.textContent = value;
  return element.outerHTML;
}

function linked(value, type, row) {
  if (type !== "display") return value;
  const element = document.createElement("a");
  const number = document.createElement("span"); // The file may wrap, its row's number may not.
  const end = value.lastIndexOf(":");
  number.className = "number";
  number.textContent = value.slice(end);
  element.href = row.link;
  element.append(value.slice(0, end), number);
  return element.outerHTML;
}

function rounded(value, type) {
  if (type !== "display" || value === null) return value;
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
}

function labelled(cell, value, row, index, place) {
  cell.dataset.label = names[place].replaceAll("_", " "); // A narrow screen shows it beside the value.
}

function column(name) {
  const shared = { data: name, createdCell: labelled };
  if (name === "place") return { ...shared, render: linked, orderable: false };
  if (numbers.has(name)) return { ...shared, render: rounded, className: "number", orderSequence: ["desc", "asc"] };
  if (texts.has(name)) return { ...shared, render: shown, orderable: false, className: "texts" };
  return { ...shared, render: shown };
}

async function fetched(request, show) {
  const parameters = new URLSearchParams(asked);
  const order = request.order[0];
  if (order) {
    parameters.set("order", names[order.column]);
    parameters.set("direction", order.dir);
  }
  parameters.set("start", request.start);
  history.replaceState(null, "", `?${parameters}`);
  parameters.set("length", request.length);
  const response = await fetch(`${table.dataset.rows}?${parameters}`);
  failed.hidden = response.ok;
  if (response.ok) {
    show({ draw: request.draw, ...(await response.json()) });
  } else {
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    failed.textContent = page.querySelector("[role=alert]")?.textContent ?? response.statusText;
    show({ draw: request.draw, recordsTotal: 0, recordsFiltered: 0, data: [] });
  }
}

const first = names.indexOf(asked.get("order"));
new DataTable(table, {
  serverSide: true,
  processing: true,
  searching: false,
  autoWidth: false,
  pageLength: 50,
  displayStart: Number(asked.get("start") ?? 0),
  order: first > 0 ? [[first, asked.get("direction") ?? "asc"]] : [],
  columns: names.map(column),
  ajax: fetched,
});
