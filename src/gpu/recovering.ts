/** What is being given back in the background, by the container's init. Apart from recover.ts, so that whoever only looks loads nothing. */
export const recovering = new Map<number, Promise<void>>();
