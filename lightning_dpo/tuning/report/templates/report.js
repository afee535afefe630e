"use strict";
const source = document.getElementById("charts").textContent;
const isTouch = matchMedia("(pointer: coarse)").matches;

let turn = 0;

// Colours stand in the data as var(--name); they are looked up here, for plotly does not know style sheets.
// The page has loaded with its first chart; it can be read and scrolled while the others are drawn, one by one.
function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const specs = JSON.parse(source.replace(/var\((--[a-z]+)\)/g, (_, name) => colour(name)));
  const line = {gridcolor: colour("--grid"), linecolor: colour("--line")};
  const mine = ++turn;
  let number = 0;
  function next() {
    if (mine !== turn || number === specs.length) return;
    const spec = specs[number];
    const place = document.getElementById("chart" + number);
    const layout = {
      ...spec.layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--text")},
      hoverlabel: {align: "left", bgcolor: colour("--panel"), bordercolor: colour("--line"),
        font: {size: 13, color: colour("--text")}},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent")},
      // A finger that moves over a chart scrolls the page.
      dragmode: isTouch ? false : "zoom",
    };
    for (const axis of ["xaxis", "yaxis"]) {
      if (layout[axis]) layout[axis] = {...line, ...layout[axis]};
    }
    // Named one by one: plotly's own set has a button that sends the chart to a server.
    const buttons = ["toImage", ...(layout.xaxis ? ["zoom2d", "pan2d", "resetScale2d"] : [])];
    Plotly.react(place, spec.data, layout, {
      responsive: true, displaylogo: false, displayModeBar: isTouch ? false : "hover",
      modeBarButtons: [buttons],
    });
    number += 1;
    setTimeout(next);
  }
  next();
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", async () => {
  const recipe = button.closest("section").querySelector("pre");
  let done = false;
  try {
    await navigator.clipboard.writeText(recipe.textContent);
    done = true;
  } catch {
    // Some browsers keep the clipboard from pages opened as a file.
    const range = document.createRange();
    range.selectNodeContents(recipe);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
  setTimeout(() => { button.textContent = "Copy the recipe"; }, 4000);
});
