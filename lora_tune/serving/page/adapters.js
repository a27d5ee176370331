// The columns' pickers, and the adapters with the scores of their manifests.

import { make, number } from './dom.js';

// A score as it is read best.
const short = value => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : number(value, Math.abs(value) < 10 ? 3 : 1));

// Below a picker: the scores of its model in one line.
export function scoreLine(model) {
  const scores = Object.entries(model?.scores ?? {}).slice(0, 3);
  if (!model) return '';
  if (model.parent === null) return 'the base, without an adapter';
  if (!scores.length) return 'no scores in its manifest';
  return scores.map(([name, score]) => `${name} ${short(score.base)} → ${short(score.adapter)}`).join(' · ');
}

// One table for each adapter.
export function scoreTables(models) {
  const adapters = models.filter(model => model.parent !== null);
  if (!adapters.length) return [make('p', { class: 'soft' }, 'No adapter is served: only the base.')];
  return adapters.map(model => {
    const about = [model.method, model.rank && `rank ${model.rank}`, model.parent && `for ${model.parent}`].filter(Boolean).join(', ');
    const rows = Object.entries(model.scores ?? {});
    const title = make('h3', {}, model.name, ' ', make('span', { class: 'place' }, about));
    if (!rows.length) return make('div', {}, title, make('p', { class: 'soft' }, 'Its manifest holds no scores.'));
    const header = ['metric', 'base', 'adapter', 'difference [95 %]', 'held-out rows', 'verdict'];
    return make('div', {}, title, make('table', {},
      make('thead', {}, make('tr', {}, ...header.map(text => make('th', { scope: 'col' }, text)))),
      make('tbody', {}, ...rows.map(([name, score]) => line(name, score, header)))));
  });
}

function line(name, score, header) {
  const verdict = judged(score);
  const cells = [
    name + (score.direction ? { higher: ' ↑', lower: ' ↓' }[score.direction] : ''),
    short(score.base), short(score.adapter),
    `${short(score.adapter - score.base)} [${short(score.low)}, ${short(score.high)}]`, number(score.rows), verdict,
  ];
  return make('tr', {}, ...cells.map((text, i) => make(i ? 'td' : 'th', { 'data-label': header[i], class: i === 5 ? verdict : '', ...(i ? {} : { scope: 'row' }) }, text)));
}

// better or worse where the interval of the difference holds no zero, else undecided.
function judged({ low, high, direction }) {
  if (!direction || (low <= 0 && high >= 0)) return 'undecided';
  return (low > 0) === (direction === 'higher') ? 'better' : 'worse';
}
