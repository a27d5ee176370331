// Which words of one text another one lacks: the longest common subsequence of words.

const CELLS = 4_000_000; // of the table; beyond, everything between the common ends counts as different
const ALIKE = 0.25; // share of words in common below which single words are not told apart
const segmenter = new Intl.Segmenter(undefined, { granularity: 'word' });

// Words and signs, each with the white space before it; together they are the text.
export function words(text) {
  const found = [];
  let space = '';
  for (const { segment } of segmenter.segment(text)) {
    if (segment.trim() === '') {
      space += segment;
    } else {
      found.push(space + segment);
      space = '';
    }
  }
  if (space) found.push(space);
  return found;
}

// For each word of `one` and of `other`, whether the two texts share it: [booleans, booleans].
export function shared(one, other) {
  const a = one.map(word => word.trim()), b = other.map(word => word.trim());
  const inOne = new Array(a.length).fill(false), inOther = new Array(b.length).fill(false);
  const both = (i, j) => { inOne[i] = inOther[j] = true; };
  let start = 0, endA = a.length, endB = b.length;
  while (start < endA && start < endB && a[start] === b[start]) both(start, start++);
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) both(--endA, --endB);
  const rows = endA - start, columns = endB - start;
  if (rows && columns && rows * columns <= CELLS) {
    // longest[i][j]: how many words a[start+i..endA] and b[start+j..endB] can share in order
    const wide = columns + 1, longest = new Uint16Array((rows + 1) * wide);
    for (let i = rows - 1; i >= 0; i--) {
      for (let j = columns - 1; j >= 0; j--) {
        longest[i * wide + j] = a[start + i] === b[start + j]
          ? longest[(i + 1) * wide + j + 1] + 1
          : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
      }
    }
    for (let i = 0, j = 0; i < rows && j < columns;) {
      if (a[start + i] === b[start + j]) both(start + i++, start + j++);
      else if (longest[(i + 1) * wide + j] >= longest[i * wide + j + 1]) i++;
      else j++;
    }
  }
  const common = inOne.filter(Boolean).length;
  if (2 * common < ALIKE * (a.length + b.length)) return [inOne.fill(false), inOther.fill(false)];
  return [inOne, inOther];
}

// The texts in runs {text, same, words}: a word is not `same` where no other text shares it.
export function compare(texts) {
  const all = texts.map(words);
  const same = all.map(list => list.map(() => false));
  for (let i = 0; i < all.length; i++) {
    for (let j = i + 1; j < all.length; j++) {
      shared(all[i], all[j]).forEach((found, side) => {
        const place = side ? j : i;
        found.forEach((isSame, word) => { same[place][word] ||= isSame; });
      });
    }
  }
  return all.map((list, i) => runs(list, same[i]));
}

function runs(list, same) {
  const found = [];
  list.forEach((text, i) => {
    if (!i || same[i] !== same[i - 1]) found.push({ text: '', same: same[i], words: 0 });
    found.at(-1).text += text;
    found.at(-1).words += 1;
  });
  return found;
}
