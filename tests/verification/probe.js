// Moves the slider through all epochs of every row, points and uses keys, and measures contrast; into an element "found".
found.opened = performance.now(); // milliseconds since the page began to load
const slider = document.getElementById("epoch"), tokens = document.getElementById("tokens");
const data = JSON.parse(document.getElementById("data").textContent);
const spans = () => [...tokens.querySelectorAll("[data-t]")];
const press = (key) => tokens.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));

data.rows.forEach((row, r) => {
  const struck = data.rates.map((_, e) => {
    slider.value = String(e);
    slider.dispatchEvent(new Event("input"));
    return spans().filter((s) => s.classList.contains("d")).map((s) => Number(s.dataset.t));
  });
  found.struck.push(struck);
  if (r === 0) {
    spans()[1].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    found.details = document.getElementById("details").textContent;
    press("ArrowRight");
    found.keyboard = document.getElementById("details").textContent;
  }
  press("n");
});

const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function pixel(colours) {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
  }
  return canvas.getImageData(0, 0, 1, 1).data;
}
// Relative luminance, as WCAG 2 defines it.
function luminance(rgba) {
  const [r, g, b] = [0, 1, 2].map((i) => (rgba[i] / 255 <= 0.03928 ? rgba[i] / 255 / 12.92 : ((rgba[i] / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  const colours = [];
  for (let e = element; e; e = e.parentElement) colours.unshift(getComputedStyle(e).backgroundColor);
  return colours;
}
for (const e of document.querySelectorAll("h1,h2,p,dt,dd,figcaption,th,td,button,label,output,mark,.t,.r,svg text")) {
  if (!e.textContent.trim()) continue;
  if (e.matches(".r") && getComputedStyle(e).display === "inline") found.errors.push("a replacement is struck through");
  const style = getComputedStyle(e), back = behind(e);
  const ink = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [low, high] = [luminance(pixel([...back, ink])), luminance(pixel(back))].sort((x, y) => x - y);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) found.contrast.push([e.tagName, String(e.className), ratio]);
}
const least = innerWidth < 640 ? 44 : 24; // of what is tapped, in pixels: WCAG 2 at levels AAA and AA
for (const e of document.querySelectorAll("button,input,select")) {
  const { width, height } = e.getBoundingClientRect();
  if (Math.min(width, height) < least) found.small.push([e.tagName, e.id, width, height]);
}
found.wide = document.documentElement.scrollWidth > innerWidth;
const result = document.createElement("pre");
result.id = "found";
result.textContent = JSON.stringify(found).replace(/</g, "(");
document.body.append(result);
