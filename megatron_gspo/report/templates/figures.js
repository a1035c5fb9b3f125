"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Okabe and Ito's colours, and lighter ones of the same order for a dark page.
  const lighter = {"#0072B2": "#56B4E9", "#D55E00": "#FF8F4F", "#009E73": "#2FCBA0", "#CC79A7": "#E9A6CB",
    "#E69F00": "#F6C14B", "#56B4E9": "#B5DFF8", "#555555": "#B9C0C7"};

  const recolored = (value) => {
    if (typeof value === "string") {
      const base = value.slice(0, 7);
      return dark.matches && lighter[base] ? lighter[base] + value.slice(7) : value;
    }
    if (Array.isArray(value)) return value.length > 50 ? value : value.map(recolored);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, recolored(inner)]));
    }
    return value;
  };

  const draw = (id) => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const {data, layout} = figures[id];
    const narrow = innerWidth < 640;
    const axis = {gridcolor: color("--grid"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true};
    const box = document.getElementById(id);
    const named = data.filter((trace) => trace.showlegend !== false && trace.type === "scatter").length;
    return Plotly.react(box, recolored(data), {
      ...layout,
      xaxis: {...axis, showgrid: false, zeroline: false, ...layout.xaxis},
      yaxis: {...axis, exponentformat: "e", ...layout.yaxis},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {family: "system-ui, sans-serif", size: narrow ? 11 : 12, color: color("--ink")},
      hoverlabel: {bgcolor: color("--paper"), bordercolor: color("--line"), font: {color: color("--ink")}},
      margin: {l: 48, r: 12, t: 8, b: 40},
      showlegend: named > 1,
      legend: {orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", traceorder: "normal", bgcolor: "rgba(0,0,0,0)"},
    }, {displaylogo: false, responsive: true, displayModeBar: false});
  };

  const quoted = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  // What is drawn, one value a line.
  const csvOf = ({data, layout}) => {
    const x = layout.xaxis.title.text, y = layout.yaxis.title.text;
    const rows = data[0].type === "heatmap" ? [[y, x, data[0].name]] : [["series", x, y]];
    for (const trace of data) {
      if (trace.type === "heatmap") {
        trace.z.forEach((line, row) => line.forEach((value, column) => rows.push([trace.y[row], trace.x[column], value])));
      } else {
        trace.x.forEach((at, index) => rows.push([trace.name, at, trace.y[index]]));
      }
    }
    return rows.map((row) => row.map(quoted).join(",") + "\n").join("");
  };

  for (const button of document.querySelectorAll("button[data-figure]")) {
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csvOf(figures[button.dataset.figure]));
      link.download = button.dataset.figure + ".csv";
      link.click();
    });
  }

  // One after the other, giving way to the reader in between.
  const drawAll = async () => {
    for (const id of Object.keys(figures)) {
      await draw(id);
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.body.dataset.drawn = Object.keys(figures).length;
  };
  dark.addEventListener("change", drawAll);
  drawAll();
})();
