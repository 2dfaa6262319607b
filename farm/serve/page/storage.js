// What the browser keeps for the page; nothing, where its user has switched storage off.

export function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

export function keep(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {} // it is kept until the page is left
}
