// What is wrong with the layout of the page as it stands, as a list of sentences.
() => {
  const wrong = [], seen = document.documentElement.clientWidth;
  const name = e => `${e.tagName.toLowerCase()}.${e.getAttribute('class') || ''} "${(e.textContent || '').trim().slice(0, 40)}"`;
  const shown = e => e.checkVisibility && e.checkVisibility();
  if (document.documentElement.scrollWidth > seen) wrong.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const e of document.querySelectorAll('body *:not(svg *)')) {
    if (!shown(e) || e.closest('thead')) continue;
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (box.right > seen + 0.5 || box.left < -0.5) wrong.push(`${name(e)} reaches from ${box.left} to ${box.right}`);
    if (e.tagName.toLowerCase() !== 'svg' && e.clientWidth && e.scrollWidth > e.clientWidth + 1)
      wrong.push(`${name(e)} holds ${e.scrollWidth} in ${e.clientWidth}`);
    if (style.overflowY !== 'visible' && e.scrollHeight > e.clientHeight + 1) wrong.push(`${name(e)} is cut off below`);
    if (style.textOverflow === 'ellipsis') wrong.push(`${name(e)} may be cut off`);
    if (['TD', 'TH', 'H1', 'H2', 'H3', 'H4', 'P', 'DT', 'DD', 'LI', 'FIGCAPTION', 'SUMMARY', 'PRE', 'CODE', 'B'].includes(e.tagName)
        && !e.textContent.trim()) wrong.push(`${name(e)} in ${name(e.parentElement)} is empty`);
    if (['SECTION', 'FIGURE', 'TABLE', 'ARTICLE', 'DETAILS'].includes(e.tagName) && box.height < 20)
      wrong.push(`${name(e)} is ${box.height} high`);
  }
  for (const picture of document.querySelectorAll('svg')) {
    if (!shown(picture)) continue;
    const frame = picture.getBoundingClientRect();
    if (frame.width < 250 || frame.height < 50) wrong.push(`a picture of ${frame.width} x ${frame.height}`);
    if (!picture.getAttribute('aria-label') || !picture.querySelector('title')) wrong.push('a picture without words');
    const parts = [...picture.querySelectorAll('path, use')].filter(e => !e.closest('defs') && !e.closest('[clip-path]'));
    if (parts.length < 4) wrong.push(`a picture of ${parts.length} parts`);
    for (const part of parts) {
      const box = part.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        wrong.push(`${part.id || part.parentElement.id} leaves its picture ${picture.getAttribute('aria-label').slice(0, 40)}`);
    }
  }
  return [...new Set(wrong)].slice(0, 12);
}
