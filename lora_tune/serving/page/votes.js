// Which answer is better: buttons, their keys, and the row that the server writes.

import { ask } from './api.js';
import { cannotVote } from './conversation.js';
import { button, make, plural, say } from './dom.js';

// The votes of a turn whose answers have ended; `onFailure` gets a Failure, `back` returns to the prompt.
export function voteBar(turn, { onFailure, back }) {
  const why = cannotVote(turn);
  if (why) return make('p', { class: 'soft votes' }, why);
  const title = make('span', { class: 'why' }, 'Which answer is better?');
  const note = make('span', { class: 'soft' });
  const choices = turn.answers.map((answer, i) => ({ key: `${i + 1}`, label: `${i + 1} · ${answer.model}`, verdict: 'better', best: i }));
  const others = turn.answers.length > 2 ? ['All alike', 'All bad'] : ['Tie', 'Both bad'];
  choices.push({ key: 't', label: others[0], verdict: 'tie' }, { key: 'b', label: others[1], verdict: 'bad' });
  const buttons = choices.map(choice => button(choice.label, () => vote(choice), {
    'aria-pressed': 'false', 'aria-keyshortcuts': choice.key.toUpperCase(),
    disabled: choice.verdict === 'better' && !distinct(turn, choice.best),
  }));
  if (turn.answers.every((_, i) => !distinct(turn, i))) note.textContent = 'The answers are equal.';
  const bar = make('div', { class: 'votes line', role: 'group', 'aria-label': 'Which answer is better?', tabIndex: -1 }, title, ...buttons, note);
  bar.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const chosen = choices.findIndex(choice => choice.key === event.key.toLowerCase());
    if (chosen >= 0 && !buttons[chosen].disabled) buttons[chosen].click();
  });

  async function vote({ verdict, best }) {
    const chosen = buttons[choices.findIndex(choice => choice.verdict === verdict && choice.best === best)];
    if (bar.dataset.saved) return;
    bar.dataset.saved = 'asked';
    chosen.setAttribute('aria-pressed', 'true');
    try {
      const { rows } = await ask('compare/votes', row(turn, { verdict, best }));
      note.textContent = rows ? `Saved: ${plural(rows, 'preference row')}.` : 'Saved, without a preference.';
      bar.dataset.saved = 'yes';
      buttons.filter(other => other !== chosen).forEach(other => { other.disabled = true; });
      say(note.textContent);
      if (bar.contains(document.activeElement)) back();
    } catch (failure) {
      chosen.setAttribute('aria-pressed', 'false');
      delete bar.dataset.saved;
      note.textContent = 'Not saved.';
      onFailure(failure);
    }
  }
  return bar;
}

// Whether an answer can be chosen: it says something, and something else than another one.
function distinct({ answers }, best) {
  const text = answers[best].text;
  return text.trim() !== '' && answers.some((answer, i) => i !== best && answer.text !== text);
}

function row({ answers }, { verdict, best }) {
  return {
    messages: answers[0].messages,
    answers: answers.map(({ model, text, finish }) => ({ model, content: text, finish_reason: finish ?? 'stop' })),
    verdict,
    ...(best === undefined ? {} : { best }),
    sampling: answers[0].sampling,
  };
}
