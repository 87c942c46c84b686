// Small helpers around the document.

export const byId = (id) => document.getElementById(id);

/** The element of a template, fresh. */
export function fromTemplate(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

/** An element with a class and text. */
export function element(name, className = "", text = "") {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;
  return node;
}
