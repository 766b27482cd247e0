/** Parts of SVG figures. */

const SVG = "http://www.w3.org/2000/svg";

export function text(content, attributes) {
  const label = node("text", attributes);
  label.textContent = content;
  return label;
}

export function node(name, attributes) {
  const made = document.createElementNS(SVG, name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  return made;
}
