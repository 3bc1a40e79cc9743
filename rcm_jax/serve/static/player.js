// Plays fragments of an MP4 as they come, and asks for the next one as late as it can: what is not yet made can still
// follow another prompt.

const Source = window.ManagedMediaSource ?? window.MediaSource;
const SLACK = 0.05; // seconds before the end of what is there, over and above what a chunk takes to come
const BEHIND = 30; // seconds of what has played that are kept

export class Player {
  // opened: what the server said. on: more(chunks), when so many in all may be made; first(), when something is seen.
  constructor(video, opened, on) {
    Object.assign(this, { video, on, queue: [], got: 0, allowed: 2, wait: 0.1, asked: performance.now(), ends: [] });
    this.source = new Source();
    video.disableRemotePlayback = true;
    this.url = video.src = URL.createObjectURL(this.source);
    this.source.addEventListener("sourceopen", () => {
      if (this.buffer) return;
      this.buffer = this.source.addSourceBuffer(opened.mime);
      this.buffer.addEventListener("updateend", () => this.feed());
      this.feed();
    });
    const seen = () => on.first();
    video.requestVideoFrameCallback ? video.requestVideoFrameCallback(seen) : video.addEventListener("playing", seen, { once: true });
    this.timer = setInterval(() => this.tend(), 15);
  }

  add(data, chunk) {
    if (this.got >= 2) this.wait = 0.7 * this.wait + 0.3 * ((performance.now() - this.asked) / 1000);
    this.got += 1;
    this.length = chunk.seconds;
    this.ends.push(chunk.start + chunk.seconds);
    this.queue.push(data);
    this.feed();
  }

  feed() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    const { video, buffer } = this;
    if (this.queue.length) buffer.appendBuffer(this.queue.shift());
    else if (buffer.buffered.length && video.currentTime - buffer.buffered.start(0) > 2 * BEHIND) buffer.remove(0, video.currentTime - BEHIND);
    else if (this.over && !this.ended) {
      this.ended = true;
      this.source.endOfStream();
    }
    if (video.paused && !this.started) {
      this.started = true;
      video.play().catch(() => (this.started = false));
    }
  }

  // Seconds that are there and have not played.
  left() {
    const ends = this.buffer?.buffered;
    return ends?.length ? Math.max(0, ends.end(ends.length - 1) - this.video.currentTime) : 0;
  }

  chunksAhead() {
    return this.ends.filter((end) => end - (this.length ?? 0) > this.video.currentTime).length;
  }

  tend() {
    this.ends = this.ends.filter((end) => end > this.video.currentTime);
    if (this.got < this.allowed || this.over) return; // what was asked for is still to come
    const lead = Math.min(2, 1.3 * this.wait + SLACK);
    if (this.left() > lead) return;
    // one at a time, unless one takes longer to come than it plays
    this.allowed = this.got + Math.max(1, Math.min(4, Math.ceil((lead - this.left()) / this.length - 0.5)));
    this.asked = performance.now();
    this.on.more(this.allowed);
  }

  finish() {
    this.over = true;
    this.feed();
  }

  close() {
    clearInterval(this.timer);
    this.over = true;
    this.video.removeAttribute("src");
    this.video.load();
    URL.revokeObjectURL(this.url);
  }
}
