// Texts, outlines of letters and dots whose contrast to what is behind them is below 4.5 (WCAG 2.2, 1.4.3).
() => {
  const numbers = colour => colour.match(/[\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = numbers(colour).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, parts = numbers(colour);
      if (parts.length === 3 || parts[3] > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const ratio = (one, other) => {
    const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const found = {};
  const check = (e, colour, what) => {
    const value = ratio(colour, behind(e));
    if (value < 4.5) found[`${what} ${colour} on ${behind(e)}: ${value.toFixed(2)}`] = true;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode())
    if (node.textContent.trim() && !node.parentElement.closest('svg'))
      check(node.parentElement, getComputedStyle(node.parentElement).color, node.parentElement.tagName);
  for (const letter of document.querySelectorAll('svg g[id*="text_"] use')) check(letter, getComputedStyle(letter).fill, 'letter');
  for (const dot of document.querySelectorAll('svg g[id*="line2d_"] > g > use')) {
    const style = getComputedStyle(dot), size = dot.getBoundingClientRect();
    if (Math.min(size.width, size.height) > 5) check(dot, style.stroke, 'dot');
  }
  return Object.keys(found);
}
