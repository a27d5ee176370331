// Elements from words. Text is always set as text: nothing that a model or a server says is read as HTML.

// An element with properties (`class`, `aria-…`, `data-…` and the like as attributes) and children (text or elements).
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.includes('-')) element[name] = value;
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== ''));
  return element;
}

export function button(label, onclick, properties = {}) {
  return make('button', { type: 'button', onclick, ...properties }, label);
}

export const byId = id => document.getElementById(id);

// Says something to screen readers, once.
export function say(text) {
  byId('status').append(make('p', {}, text));
  while (byId('status').children.length > 6) byId('status').firstElementChild.remove();
}

export const number = (value, digits = 0) => value.toLocaleString('en', { maximumFractionDigits: digits });
export const plural = (count, word) => `${number(count)} ${word}${count === 1 ? '' : 's'}`;
