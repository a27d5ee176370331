// A prompt as the training template writes it: token by token, special ones framed.

import { ask } from './api.js';
import { make, plural } from './dom.js';

// Shows what `model` is fed for these messages. Throws Failure.
export async function promptAsTokens({ model, messages }) {
  const { count, left_out, left_out_after, pieces } = await ask('compare/tokens', { model, messages });
  const special = pieces.filter(piece => piece.special).length;
  const text = make('p', { class: 'pieces text', translate: false });
  let before = 0;
  for (const piece of pieces) {
    if (left_out && before === left_out_after) text.append(make('em', {}, ` … ${plural(left_out, 'token')} left out … `));
    before += piece.ids.length;
    const title = `${piece.special ? 'special token' : piece.ids.length > 1 ? 'tokens' : 'token'} ${piece.ids.join(', ')}`;
    text.append(make(piece.special ? 'b' : 'span', { title }, visible(piece.text)));
  }
  return make('div', { class: 'tokens', role: 'group', 'aria-label': `Prompt of ${model} as tokens` },
    make('p', { class: 'soft' }, `What ${model} is fed, by the template of its training: ${plural(count, 'token')}, `,
      make('b', { class: 'key' }, plural(special, 'special one')), '. The answer begins where it ends.'),
    text,
    make('details', {}, make('summary', {}, 'Token ids'), make('code', {}, `[${pieces.flatMap(piece => piece.ids).join(', ')}]`)));
}

// Line ends and empty pieces that can be seen.
function visible(text) {
  return text.replace(/\r/g, '␍').replace(/\t/g, '⇥\t').replace(/\n/g, '↵\n') || '∅';
}
