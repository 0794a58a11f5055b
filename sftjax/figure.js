// Shows the values under the pointer below each chart.
for (const figure of document.querySelectorAll("figure")) {
  const readout = figure.querySelector(".readout");
  const series = JSON.parse(figure.querySelector("script").textContent);
  const show = (value) => value === null ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
  for (const svg of figure.querySelectorAll("svg")) { // drawn for wide and for narrow places; one is shown
    const cursor = svg.querySelector(".cursor"), [left, right, low, high] = svg.dataset.frame.split(",").map(Number);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const at = low + (Math.min(Math.max(x, left), right) - left) / (right - left) * (high - low);
      const near = series.map((one) => [one.name, one.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)]);
      const step = near.reduce((a, b) => Math.abs(b[1][0] - at) < Math.abs(a[1][0] - at) ? b : a)[1][0];
      const place = left + (high > low ? (step - low) / (high - low) : 0) * (right - left);
      cursor.setAttribute("x1", place); cursor.setAttribute("x2", place); cursor.setAttribute("visibility", "visible");
      readout.textContent = `step ${step}: ` + near.filter(([, p]) => p[0] === step).map(([name, p]) => `${name} ${show(p[1])}`).join(", ");
    });
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
  }
}
